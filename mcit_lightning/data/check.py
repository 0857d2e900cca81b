"""The check of a split's rows while its file is read: what is malformed is refused or counted before any training."""

import logging
from array import array
from collections.abc import Iterable
from typing import Any

import numpy as np

from mcit_lightning.data.images import ImageFolder, Listings
from mcit_lightning.data.readers import Rows
from mcit_lightning.data.records import FindReference, Parts, Place, Split, parse_parts
from mcit_lightning.evaluation.metrics import AnswerMetric

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_IMAGE = 256
LONGEST = 2**30

logger = logging.getLogger(__name__)


class RowCheck:
    """Sees every row once while the file is read, and forgets all but lengths, hashes and image names.

    Args:
        split: which split.
        key: the configuration key of the file, for messages.
        metric: of a test split; refuses answers that it cannot score.
        metric_name: what the configuration calls it.
        find_reference: answers that are in a file of their own.
        skip_malformed: count malformed rows instead of refusing the first one.
    """

    def __init__(
        self,
        split: Split,
        key: str,
        *,
        metric: AnswerMetric | None = None,
        metric_name: str = "",
        find_reference: FindReference | None = None,
        skip_malformed: bool = False,
    ) -> None:
        self.source = ""
        self.text_only = False
        self.skip_malformed = skip_malformed
        self._split: Split = split
        self._key = key
        self._metric = metric
        self._metric_name = metric_name
        self._find_reference = find_reference
        self._lengths = array("i")
        self._ids = array("q")
        self._questions = array("q")
        self._names = bytearray()  # of all rows: each ends with a zero byte, and each row with a further one
        self._bad: list[int] = []
        self._first_error: ValueError | None = None

    def __call__(self, index: int, row: Any) -> None:
        try:
            parts = self._parse(index, row)
            if self._metric is not None:
                self._score(index, parts)
        except ValueError as error:
            self.unreadable(index, error)
            return
        characters = sum(len(text) for _, text in parts.turns)
        length = characters // CHARACTERS_PER_TOKEN + TOKENS_PER_IMAGE * len(parts.images)
        self._lengths.append(min(length, LONGEST))
        self._ids.append(hash(parts.id))
        if self._split == "test":
            self._questions.append(hash((parts.id, parts.turns)))
        for name in parts.images:
            if isinstance(name, str):
                self._names += name.encode("utf-8", "surrogatepass") + b"\0"
        self._names += b"\0"
        self.text_only |= not parts.images

    def unreadable(self, index: int, error: ValueError) -> None:
        """Count a malformed row, or raise `error`."""
        if not self.skip_malformed:
            raise error
        self._first_error = self._first_error or error
        self._bad.append(index)
        self._lengths.append(0)
        self._ids.append(-index - 1)
        self._questions.append(-index - 1)
        self._names += b"\0"

    def _parse(self, index: int, row: Any) -> Parts:
        place = Place(self.source, self._key, index)
        parts = parse_parts(row, place, split=self._split, find_reference=self._find_reference)
        for name in parts.images:
            if isinstance(name, str) and "\0" in name:
                raise place._replace(id=parts.id).error("`image`", f"is {name!r}", "A file name has no zero byte.")
        return parts

    def _score(self, index: int, parts: Parts) -> None:
        assert self._metric is not None
        try:
            self._metric.check(parts.reference, parts.extra)
        except Exception as error:  # the metric may be the user's own
            raise Place(self.source, self._key, index, parts.id).error(
                "`answer`", f"cannot be scored by {self._metric_name}: {error}", "Correct the row or the metric."
            ) from error

    def finish(self, rows: Rows) -> np.ndarray:
        """Numbers of the usable rows, ascending, after all have been seen.

        Raises:
            ValueError: a test row repeats a question, or no row is usable.
        """
        if self._split == "test":
            for first, index in _repeated(self._questions):
                self._refuse_repetition(rows, first, index)
        if self._bad:
            if len(self._bad) == len(rows):
                assert self._first_error is not None
                raise self._first_error
            logger.warning(
                "%s (%s): %d of %d rows are malformed and left out; the first: %s",
                rows.source,
                self._key,
                len(self._bad),
                len(rows),
                self._first_error,
            )
        ids = np.frombuffer(self._ids, dtype=np.int64)
        repeated = len(ids) - len(np.unique(ids))
        if repeated:
            logger.info("%s (%s): %d of %d ids are repeated", rows.source, self._key, repeated, len(rows))
        usable = np.ones(len(rows), dtype=bool)
        usable[self._bad] = False
        return np.flatnonzero(usable)

    def lengths_of(self, keep: np.ndarray) -> np.ndarray:
        """Estimated tokens of rows."""
        return np.frombuffer(self._lengths, dtype=np.int32)[keep]

    def _refuse_repetition(self, rows: Rows, first: int, index: int) -> None:
        one, two = (self._parse(number, rows.row(number)) for number in (first, index))
        if (one.id, one.turns) != (two.id, two.turns):  # two texts of one hash
            return
        error = Place(self.source, self._key, index, two.id).error(
            "`question_id`",
            f"repeats {two.id!r} of row {first + 1}, with the same question",
            "Remove one of the rows or number them anew: a prediction belongs to one row.",
        )
        if not self.skip_malformed:
            raise error
        self._first_error = self._first_error or error
        self._bad.append(index)

    def images_exist(self, images: ImageFolder, keep: np.ndarray, key: str, root: str) -> None:
        """Raise for the first image in use that is nowhere, and say how many there are.

        Args:
            images: where they should be.
            keep: rows in use, ascending.
            key: the configuration key of the folder, for messages.
            root: `data.root`.
        """
        listings: Listings = {}
        absent = [
            (row, name, path) for row, name in self._named(keep) if (path := images.missing(name, listings)) is not None
        ]
        self._names = bytearray()
        if absent:
            row, name, path = absent[0]
            others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise Place(self.source, self._key, row).error(
                "`image`",
                f"names {name!r:.200}, but there is no file {path:.500}{others}",
                f"Correct {key} or data.root ({root}), or add the images.",
            )

    def _named(self, keep: np.ndarray) -> Iterable[tuple[int, str]]:
        """Row number and image name of the rows in use."""
        wanted = iter(keep.tolist())
        row, chosen, start = 0, next(wanted, -1), 0
        names = self._names
        while chosen >= 0:
            end = names.index(0, start)
            if end == start:
                if row == chosen:
                    chosen = next(wanted, -1)
                row += 1
            elif row == chosen:
                yield row, names[start:end].decode("utf-8", "surrogatepass")
            start = end + 1


def _repeated(hashes: array) -> Iterable[tuple[int, int]]:
    """Pairs of positions that hold the same number: the first one, and each later one in ascending order."""
    values = np.frombuffer(hashes, dtype=np.int64)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    firsts = first[inverse]
    return [(int(firsts[index]), int(index)) for index in np.flatnonzero(firsts != np.arange(len(values)))]
