"""One row of a task's file as a `Sample`, and the error that says which row is wrong and how to mend it."""

import difflib
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from PIL import Image

Split = Literal["train", "val", "test"]
Role = Literal["user", "assistant"]
Turns = tuple[tuple[Role, str], ...]

IMAGE_TOKEN = "<image>"
SPEAKERS: Mapping[str, Role] = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


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
        id: the row's `id` or `question_id` as text; the row number where a row has none.
        task: name of the task.
        images: absolute paths, or handles of a Hugging Face dataset. They stand before the first user turn's text.
        turns: speaker and text, without `<image>`. Ends with the assistant in training, with the user in a test split.
        reference: the answer as in the file (test split only).
        extra: every other key of the row; in a test split also `question_id` and `text` as in the file, and `image` where
            it is a name or a list of names: some benchmarks score by them, and their scripts compare ids of one type.
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


class Place(NamedTuple):
    """Where a row stands: the file or dataset, the configuration key that names it and the 0-based row number."""

    source: str
    key: str
    row: int
    id: str | None = None

    def error(self, key: str, problem: str, remedy: str) -> ValueError:
        """The error for `key` of this row."""
        name = "" if self.id is None else f"id {self.id!r}, "
        return ValueError(f"{self.source}, row {self.row + 1} ({name}{self.key}): {key} {problem}. {remedy}")


class RowFault(Exception):
    """What is wrong with a row; the reader adds where it stands. Arguments: key, problem, remedy."""


class Parts(NamedTuple):
    """The fields of a `Sample` that come from the row itself."""

    id: str
    images: tuple[ImageSource, ...]
    turns: Turns
    reference: Any | None
    extra: dict[str, Any]


FindReference = Callable[[str, int], tuple[Any, dict[str, Any]]]
"""From a row's id and number to its answer and further keys; raises `KeyError` where there is none."""


def parse_row(
    row: Any, place: Place, *, task: str, split: Split, find_reference: FindReference | None = None
) -> Sample:
    """Turn a row into a `Sample` whose images are still the names in the row. See `parse_parts`."""
    parts = parse_parts(row, place, split=split, find_reference=find_reference)
    return Sample(
        id=parts.id,
        task=task,
        images=parts.images,
        turns=parts.turns,
        reference=parts.reference,
        extra=parts.extra,
        source=place.source,
        row=place.row,
    )


def parse_parts(row: Any, place: Place, *, split: Split, find_reference: FindReference | None = None) -> Parts:
    """Check a row and take it apart.

    Training and validation rows are ShareGPT conversations, `{"id", "image", "conversations"}` (LLaVA, InternVL). A test
    row is one of

    * a LLaVA question `{"question_id", "image", "text", "answer"}`; CoIN's grounding rows have `answer_bbox` instead;
    * an InternVL question `{"question_id", "image", "question", "answer"}`, to which `choices` are appended by letter
      (`answer` is then the number of the right one);
    * an InternVL grounding row `{"image", "sent", "bbox", "width", "height"}` with or without `knowledge`;
    * a conversation, whose last assistant turn is then the reference.

    `image` (or `images`) is missing, a name or a list of names. Images that no `<image>` mentions come before the first
    user turn, as in the loaders of the published benchmarks.

    Args:
        row: the parsed row.
        place: where it stands, for messages.
        split: which split it belongs to.
        find_reference: answers that the benchmark keeps in a file of its own; they replace the row's.

    Raises:
        ValueError: the row does not have that form; names file, row, key, value and remedy.
    """
    identity = None
    try:
        if not isinstance(row, dict):
            raise RowFault("the row", f"is {_show(row)}, not an object", "Check the file and `format` of the task.")
        identity = _identity(row, split)
        if split == "test":
            return _test_parts(row, identity, place.row, find_reference)
        images = _images(row)
        turns = _without_image_tokens(_conversation(row), len(images))
        extra = {name: value for name, value in row.items() if name not in _TRAIN_KEYS}
        return Parts(str(place.row) if identity is None else identity, images, turns, None, extra)
    except RowFault as fault:
        raise place._replace(id=identity).error(*fault.args) from None


_TRAIN_KEYS = frozenset({"id", "image", "images", "conversations"})


def _identity(row: dict[str, Any], split: Split) -> str | None:
    key = "question_id" if split == "test" and row.get("question_id") is not None else "id"
    value = row.get(key)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowFault(f"`{key}`", f"is {_show(value)}", "An id is a text or a number.")
    return str(value)


def _test_parts(row: dict[str, Any], identity: str | None, number: int, find: FindReference | None) -> Parts:
    images = _images(row)
    name = str(number) if identity is None else identity
    used: tuple[str, ...] = ("question_id" if row.get("question_id") is not None else "id",)
    if "conversations" in row:
        turns = _conversation(row)
        reference, turns = turns[-1][1], turns[:-1]
        text, used = turns[-1][1], (*used, "conversations")
    else:
        text, reference, keys = _question(row, answered=find is not None)
        turns, used = (("user", text),), (*used, *keys)
    turns = _without_image_tokens(turns, len(images))
    extra = {key: value for key, value in row.items() if key not in used and key not in ("image", "images")}
    extra["text"] = text
    if identity is not None:
        extra["question_id"] = row[used[0]]
    names = [image for image in images if isinstance(image, str)]
    if names:
        extra["image"] = names[0] if len(names) == 1 else names
    if find is not None:
        try:
            reference, further = find(name, number)
        except KeyError as error:
            raise RowFault(
                "the row", f"has no answer in the file of references: {error.args[0]}", _REFERENCES
            ) from None
        extra.update(further)
    return Parts(name, images, turns, reference, extra)


_REFERENCES = "Correct `references` of the task, or leave it out if the rows hold their answers."


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """A sentence with the nearest known name, or an empty string."""
    close = difflib.get_close_matches(str(name), [str(other) for other in known], n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _images(row: dict[str, Any]) -> tuple[ImageSource, ...]:
    key = "image" if row.get("image") is not None else "images"
    value = row.get(key)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (value,)
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name == "" or not (isinstance(name, str) or hasattr(name, "open")):
            raise RowFault(f"`{key}`", f"is {_show(value)}", "Give one file name, or a list of file names.")
    return tuple(names)


def _question(row: dict[str, Any], *, answered: bool) -> tuple[str, Any, tuple[str, ...]]:
    """Text, answer and the keys that hold them, of a test row without conversations."""
    if "text" not in row and "sent" in row:
        text = "" if row.get("knowledge") is None else KNOWLEDGE_PROMPT.format(_text(row, "knowledge"))
        return text + GROUNDING_PROMPT.format(_text(row, "sent")), _value(row, "bbox", answered), ("sent", "bbox")
    if "text" not in row and "question" in row:
        text = _text(row, "question")
        if "choices" in row:
            text = "\n".join([text, *_lettered(row["choices"])])
        return text, _value(row, "answer", answered), ("question", "answer")
    _value(row, "question_id", False)
    text = _text(row, "text")
    key = "answer_bbox" if row.get("answer") is None and row.get("answer_bbox") is not None else "answer"
    return text, _value(row, key, answered), ("text", key)


CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
KNOWLEDGE_PROMPT = "Based on the knowledge {}.\n"
GROUNDING_PROMPT = "Please provide the bounding box coordinate of the region this sentence describes: <ref>{}</ref>"
"""The questions of InternVL's evaluation, which D-MoLE uses, for rows that have none of their own."""


def _text(row: dict[str, Any], key: str) -> str:
    value = _value(row, key, False)
    if not isinstance(value, str):
        raise RowFault(f"`{key}`", f"is {_show(value)}, not a text", "Write it as a string.")
    return value


def _value(row: dict[str, Any], key: str, optional: bool) -> Any:
    value = row.get(key)
    if value is None and not optional:
        remedy = f"A test row has `question_id`, `text` and `answer`.{did_you_mean(key, row)}"
        raise RowFault(f"`{key}`", "is missing" if key not in row else "is null", remedy)
    return value


def _lettered(choices: Any) -> list[str]:
    if not isinstance(choices, list) or not 0 < len(choices) <= len(LETTERS):
        raise RowFault("`choices`", f"is {_show(choices)}", f"It must be a list of 1 to {len(LETTERS)} options.")
    return [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]


def _conversation(row: dict[str, Any]) -> Turns:
    if "conversations" not in row:
        raise RowFault(
            "`conversations`",
            f"is missing; the row has {_show(sorted(map(str, row)))}",
            'Write `"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": ...}]`.'
            f"{did_you_mean('conversations', row)}",
        )
    entries = row["conversations"]
    if not isinstance(entries, list) or not entries:
        raise RowFault("`conversations`", f"is {_show(entries)}", "It must be a list of turns, none left out.")
    turns = []
    expected: Role = "user"
    for number, entry in enumerate(entries):
        role, text = _turn(entry, number)
        if role != expected:
            raise RowFault(
                f"`conversations[{number}].from`",
                f"is {entry['from']!r} where the {expected} should speak",
                "Turns alternate and the user (`human`) begins.",
            )
        expected = "assistant" if role == "user" else "user"
        turns.append((role, text))
    if expected != "user":
        raise RowFault(
            f"`conversations[{len(turns) - 1}].from`",
            f"is {entries[-1]['from']!r}, so the conversation has no answer at its end",
            "Add the assistant's (`gpt`) turn or remove the row.",
        )
    return tuple(turns)


def _turn(entry: Any, number: int) -> tuple[Role, str]:
    if not isinstance(entry, dict) or "from" not in entry or "value" not in entry:
        remedy = 'A turn is {"from": "human" or "gpt", "value": text}.'
        raise RowFault(f"`conversations[{number}]`", f"is {_show(entry)}", remedy)
    speaker, value = entry["from"], entry["value"]
    if not isinstance(speaker, str) or speaker not in SPEAKERS:
        remedy = f"Known speakers: human/user and gpt/assistant.{did_you_mean(speaker, SPEAKERS)}"
        raise RowFault(f"`conversations[{number}].from`", f"is {_show(speaker)}, an unknown speaker", remedy)
    if not isinstance(value, str):
        raise RowFault(
            f"`conversations[{number}].value`", f"is {_show(value)}, not a text", "Write the turn as a string."
        )
    return SPEAKERS[speaker], value


def _without_image_tokens(turns: Turns, num_images: int) -> Turns:
    counts = [text.count(IMAGE_TOKEN) for _, text in turns]
    if not any(counts):
        return turns
    total = sum(counts)
    if total != num_images:
        raise RowFault(
            "`image`",
            f"names {num_images} image(s), but the text holds {total} `{IMAGE_TOKEN}`",
            f"Write one `{IMAGE_TOKEN}` per image, or none (the images then come first).",
        )
    if counts[0] != total:
        number = next(index for index, count in enumerate(counts) if index and count)
        raise RowFault(
            f"`conversations[{number}].value`",
            f"holds `{IMAGE_TOKEN}`",
            "Images may stand in the first user turn only; move it there or split the conversation.",
        )
    (role, text), *rest = turns
    return ((role, text.replace(IMAGE_TOKEN, "").strip()), *rest)


def _show(value: object) -> str:
    return reprlib.repr(value)
