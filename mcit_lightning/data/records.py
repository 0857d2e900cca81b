"""One row of a task's file as a `Sample`, and the error that says which row is wrong and how to mend it."""

import difflib
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from PIL import Image

Split = Literal["train", "val", "test"]
Role = Literal["user", "assistant"]
Turns = tuple[tuple[Role, str], ...]

IMAGE_TOKEN = "<image>"
SPEAKERS: Mapping[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class LazyImage(Protocol):
    """A picture that lives inside a dataset and is decoded when it is opened."""

    def open(self) -> Image.Image:
        """Decode the picture."""
        ...


ImageSource = str | LazyImage


@dataclass(frozen=True)
class Sample:
    """One conversation about its images.

    Args:
        id: the row's `id` or `question_id` as text; the row number where a training row has none.
        task: name of the task.
        images: absolute paths, or handles of a Hugging Face dataset. They stand before the first user turn's text.
        turns: speaker and text, without `<image>`. Ends with the assistant in training, with the user in a test split.
        reference: the answer as in the file (test split only).
        extra: every other key of the row.
        source: file or dataset that the row comes from, for messages.
        row: 0-based row number in the source.
    """

    id: str
    task: str
    images: tuple[ImageSource, ...]
    turns: Turns
    reference: Any | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    row: int = -1

    @property
    def place(self) -> str:
        """The row in words, as error messages name it."""
        name = f"id {self.id!r}, task {self.task!r}"
        return f"{self.source}, row {self.row + 1} ({name})" if self.source else f"sample {name}"

    @property
    def characters(self) -> int:
        """Length of all turns' text."""
        return sum(len(text) for _, text in self.turns)


@dataclass(frozen=True)
class Place:
    """Where a row stands: the file or dataset, the configuration key that names it and the 0-based row number."""

    source: str
    key: str
    row: int
    id: str | None = None

    def error(self, key: str, problem: str, remedy: str) -> ValueError:
        """The error for `key` of this row."""
        name = "" if self.id is None else f"id {self.id!r}, "
        return ValueError(f"{self.source}, row {self.row + 1} ({name}{self.key}): {key} {problem}. {remedy}")


def parse_row(row: Any, place: Place, *, task: str, split: Split) -> Sample:
    """Turn a row into a `Sample` whose images are still the names in the row.

    Training and validation rows are `{"id", "image", "conversations"}`. Test rows are `{"question_id", "image", "text",
    "answer"}`, or conversations, whose last assistant turn is then the reference. `image` (or `images`) is missing, a
    name or a list of names. Images that no `<image>` mentions come before the first user turn, as in the loaders of the
    published benchmarks.

    Raises:
        ValueError: the row does not have that form; names file, row, key, value and remedy.
    """
    if not isinstance(row, dict):
        raise place.error("the row", f"is {_show(row)}, not an object", "Check the file and `format` of the task.")
    key = "question_id" if split == "test" and row.get("question_id") is not None else "id"
    identity = row.get(key)
    place = Place(place.source, place.key, place.row, None if identity is None else str(identity))
    images = _images(row, place)
    used = {key, "image", "images"}
    reference = None
    if split == "test" and "conversations" not in row:
        turns, reference = _question(row, place)
        used |= {"text", "answer"}
    else:
        turns = _conversation(row, place)
        used.add("conversations")
        if split == "test":
            reference, turns = turns[-1][1], turns[:-1]
    return Sample(
        id=str(place.row) if place.id is None else place.id,
        task=task,
        images=images,
        turns=_without_image_tokens(turns, len(images), place),
        reference=reference,
        extra={name: value for name, value in row.items() if name not in used},
        source=place.source,
        row=place.row,
    )


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """A sentence with the nearest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _images(row: dict[str, Any], place: Place) -> tuple[ImageSource, ...]:
    key = "image" if row.get("image") is not None else "images"
    value = row.get(key)
    if value is None or value == "":
        return ()
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name == "" or not (isinstance(name, str) or hasattr(name, "open")):
            raise place.error(f"`{key}`", f"is {_show(value)}", "Give one file name, or a list of file names.")
    return tuple(names)


def _question(row: dict[str, Any], place: Place) -> tuple[Turns, Any]:
    for key in ("question_id", "text", "answer"):
        if row.get(key) is None:
            remedy = f"A test row has `question_id`, `text` and `answer`.{did_you_mean(key, row)}"
            raise place.error(f"`{key}`", "is missing" if key not in row else "is null", remedy)
    if not isinstance(row["text"], str):
        raise place.error("`text`", f"is {_show(row['text'])}, not a text", "Write the question as a string.")
    return (("user", row["text"]),), row["answer"]


def _conversation(row: dict[str, Any], place: Place) -> Turns:
    if "conversations" not in row:
        remedy = (
            'Write `"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]`.'
            f"{did_you_mean('conversations', row)}"
        )
        raise place.error("`conversations`", f"is missing; the row has {_show(sorted(map(str, row)))}", remedy)
    entries = row["conversations"]
    if not isinstance(entries, list) or not entries:
        raise place.error("`conversations`", f"is {_show(entries)}", "It must be a list of turns, none left out.")
    turns = tuple(_turn(entry, number, place) for number, entry in enumerate(entries))
    for number, (role, _) in enumerate(turns):
        expected = "user" if number % 2 == 0 else "assistant"
        if role != expected:
            said = entries[number]["from"]
            raise place.error(
                f"`conversations[{number}].from`",
                f"is {said!r} where the {expected} should speak",
                "Turns alternate and the user (`human`) begins.",
            )
    if turns[-1][0] != "assistant":
        raise place.error(
            f"`conversations[{len(turns) - 1}].from`",
            f"is {entries[-1]['from']!r}, so the conversation has no answer at its end",
            "Add the assistant's (`gpt`) turn or remove the row.",
        )
    return turns


def _turn(entry: Any, number: int, place: Place) -> tuple[Role, str]:
    key = f"`conversations[{number}]"
    if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
        raise place.error(f"{key}`", f"is {_show(entry)}", 'A turn is {"from": "human" or "gpt", "value": text}.')
    speaker, value = entry["from"], entry["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        remedy = f"Known speakers: human/user and gpt/assistant.{did_you_mean(speaker, SPEAKERS)}"
        raise place.error(f"{key}.from`", f"is {_show(speaker)}, an unknown speaker", remedy)
    if not isinstance(value, str):
        raise place.error(f"{key}.value`", f"is {_show(value)}, not a text", "Write the turn as a string.")
    return SPEAKERS[speaker], value


def _without_image_tokens(turns: Turns, num_images: int, place: Place) -> Turns:
    counts = [text.count(IMAGE_TOKEN) for _, text in turns]
    if not any(counts):
        return turns
    if sum(counts) != num_images:
        raise place.error(
            "`image`",
            f"names {num_images} image(s), but the text holds {sum(counts)} `{IMAGE_TOKEN}`",
            f"Write one `{IMAGE_TOKEN}` per image, or none (the images then come first).",
        )
    if any(counts[1:]):
        number = next(index for index, count in enumerate(counts) if index and count)
        raise place.error(
            f"`conversations[{number}].value`",
            f"holds `{IMAGE_TOKEN}`",
            "Images may stand in the first user turn only; move it there or split the conversation.",
        )
    (role, text), *rest = turns
    return ((role, text.replace(IMAGE_TOKEN, "").strip()), *rest)


def _show(value: object) -> str:
    return reprlib.repr(value)
