"""Opening and decoding every picture of a split, several at a time."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from mcit_lightning.data.images import load_image
from mcit_lightning.data.records import ImageSource, Sample
from mcit_lightning.verify.rows import Entry, Survey

CHUNK = 256
"""Pictures that wait at a time; the decoders work on them side by side, because Pillow lets go of the interpreter."""

Tick = Callable[[int], None]
"""Told how many pictures were looked at since the last call."""


@dataclass
class Pictures:
    """What became of the pictures of a split.

    Args:
        files: different pictures that the rows name.
        decoded: how many of them were decoded; those that an earlier split has in common count.
        missing: a message for each that is nowhere.
        unreadable: a message for each that is no whole picture.
        bad_rows: numbers of the rows that lack a picture.
    """

    files: int = 0
    decoded: int = 0
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    bad_rows: set[int] = field(default_factory=set)


class PictureCheck:
    """Decodes pictures once each, however many rows, splits and tasks name them.

    Args:
        workers: pictures to decode at the same time.
        limit: decode at most so many of a split; None for all. All are looked for.
    """

    def __init__(self, workers: int, limit: int | None = None) -> None:
        self._workers = workers
        self._limit = limit
        self._known: dict[str, str | None] = {}

    def check(self, survey: Survey, in_use: set[int] | None, key: str, root: str, tick: Tick | None = None) -> Pictures:
        """Look for the pictures of a split and decode them.

        Args:
            survey: the split.
            in_use: numbers of the rows that the run uses; None for all.
            key: the configuration key of the pictures' folder, for messages.
            root: `data.root`, for messages.
            tick: is told of the progress.
        """
        entries = [entry for entry in survey.entries if in_use is None or entry.row in in_use]
        found = Pictures()
        self._find(survey, entries, found, key, root)
        todo: dict[object, tuple[ImageSource, Entry]] = {}
        users: dict[object, list[int]] = {}
        for entry in entries:
            for number, source in enumerate(entry.images):
                if entry.row in found.bad_rows and isinstance(source, str):
                    continue  # one of the row's files is missing; the others are decoded for other rows
                place = survey.folder.path(source) if isinstance(source, str) else source
                name: object = place if isinstance(place, str) else (entry.row, number)
                todo.setdefault(name, (place, entry))
                users.setdefault(name, []).append(entry.row)
        found.files = len(todo) + len(found.missing)
        chosen = list(islice(todo.items(), self._limit))
        found.decoded = len(chosen)
        for name, error in self._decode(survey, chosen, tick):
            if error is not None:
                found.unreadable.append(error)
                found.bad_rows.update(users[name])
        return found

    def _find(self, survey: Survey, entries: list[Entry], found: Pictures, key: str, root: str) -> None:
        rows = {entry.row for entry in entries}
        lacking: dict[str, list[Entry]] = {}
        for entry, path in survey.missing():
            if entry.row in rows:
                lacking.setdefault(path, []).append(entry)
        for path, users in lacking.items():
            more = f" ({len(users)} rows name it)" if len(users) > 1 else ""
            remedy = f"Correct {key} or data.root ({root}), or add the images."
            found.missing.append(
                str(survey.place(users[0]).error("`image`", f"names a file that is not there, {path}{more}", remedy))
            )
            found.bad_rows.update(entry.row for entry in users)

    def _decode(
        self, survey: Survey, chosen: list[tuple[object, tuple[ImageSource, Entry]]], tick: Tick | None
    ) -> Iterator[tuple[object, str | None]]:
        """Names of pictures, and what is wrong with them."""

        def decode(item: tuple[object, tuple[ImageSource, Entry]]) -> tuple[object, str | None]:
            name, (source, entry) = item
            if isinstance(name, str) and name in self._known:
                return name, self._known[name]
            sample = Sample(entry.id, survey.task, (), (), source=survey.source, row=entry.row)
            try:
                load_image(source, sample)
            except ValueError as error:
                return name, str(error)
            return name, None

        with ThreadPoolExecutor(self._workers) as pool:
            for chunk in _chunks(chosen, CHUNK):
                for name, error in pool.map(decode, chunk):
                    if isinstance(name, str):
                        self._known[name] = error
                    yield name, error
                if tick is not None:
                    tick(len(chunk))


def _chunks(items: Iterable[tuple[object, tuple[ImageSource, Entry]]], size: int) -> Iterator[list]:
    rest = iter(items)
    while chunk := list(islice(rest, size)):
        yield chunk
