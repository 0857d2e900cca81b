"""Predictions that a run, or another tool, has left behind, in the published forms."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcit_lightning.data.jsonscan import BOM
from mcit_lightning.data.readers import check_file, read_file
from mcit_lightning.data.records import Place


@dataclass(frozen=True)
class Answer:
    """One prediction.

    Args:
        id: the question's id; None where the form has none.
        text: the predicted answer.
        row: 0-based number of the line in the file.
        prompt: the question, where the form has it.
        reference: the right answer, where the form has it.
        extra: keys that a metric may need.
        by_image: the id is an image's, not a question's.
    """

    id: str | None
    text: str
    row: int
    prompt: str | None = None
    reference: Any | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    by_image: bool = False


def read_answers(path: Path) -> list[Answer]:
    """Read a file of predictions, a JSON array or JSON lines, whose rows are one of

    * `{"question_id", "prompt", "text", ...}`: LLaVA's answers, which every script of CoIN, UCIT, MLLM-CL and TriGap reads.
      Ours are these with `answer`, the reference, and `index`, the row of the test file;
    * `{"questionId", "prediction"}`: what GQA's script reads;
    * `{"image_id", "caption"}`: COCO caption results;
    * `{"answer", "gt_bbox", "hw"}`: InternVL's grounding, box in pixels and the picture's height and width;
    * `{"question", "answer", "gt_answers", "image_path"}`: InternVL's multiple choice, whose answers are letters already;
    * `{"question", "question_id" or "questionId", "answer"}` with or without `annotation`: InternVL's VQA; its
      submissions to VizWiz have the name of the `image` in place of an id.

    Raises:
        ValueError: there is no such file, it is no JSON, is empty, or a row has none of these forms; names file, row and key.
    """
    key = "predictions"
    check_file(path, key)
    with path.open("rb") as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    answers: list[Answer] = []

    def visit(index: int, row: Any) -> None:
        answers.append(_answer(row, Place(str(path), key, index)))

    read_file(path, "json" if start[:1] == b"[" else "jsonl", key, visit)
    if not answers:
        raise ValueError(f"{path}: holds no predictions. Give the file that a run or another tool wrote.")
    return answers


def _answer(row: Any, place: Place) -> Answer:
    if isinstance(row, dict):
        for keys, read in _FORMS:
            if keys <= row.keys():
                return read(row, place)
    forms = "; ".join(", ".join(sorted(keys)) for keys, _ in _FORMS)
    raise place.error("the row", f"is {row!r:.200}", f"A prediction has one of these sets of keys: {forms}.")


def _llava(row: dict[str, Any], place: Place) -> Answer:
    extra = row["extra"] if isinstance(row.get("extra"), dict) else {}
    prompt = row["prompt"] if isinstance(row.get("prompt"), str) else None
    number = row.get("index")
    index = number if isinstance(number, int) and not isinstance(number, bool) else place.row
    return Answer(_id(row, "question_id", place), _text(row, "text", place), index, prompt, row.get("answer"), extra)


def _gqa(row: dict[str, Any], place: Place) -> Answer:
    return Answer(_id(row, "questionId", place), _text(row, "prediction", place), place.row)


def _coco(row: dict[str, Any], place: Place) -> Answer:
    return Answer(_id(row, "image_id", place), _text(row, "caption", place), place.row, by_image=True)


def _grounding(row: dict[str, Any], place: Place) -> Answer:
    size = row["hw"]
    if not isinstance(size, list) or len(size) != 2:
        raise place.error("`hw`", f"is {size!r}", "It is the picture's height and width.")
    extra = {"height": size[0], "width": size[1]}
    return Answer(None, _text(row, "answer", place), place.row, reference=row["gt_bbox"], extra=extra)


def _choice(row: dict[str, Any], place: Place) -> Answer:
    prompt = row["question"] if isinstance(row.get("question"), str) else None
    return Answer(None, _text(row, "answer", place), place.row, prompt, row["gt_answers"])


def _vqa(key: str) -> Callable[[dict[str, Any], Place], Answer]:
    def read(row: dict[str, Any], place: Place) -> Answer:
        prompt = row["question"] if isinstance(row.get("question"), str) else None
        identity = _id(row, key, place)
        return Answer(identity, _text(row, "answer", place), place.row, prompt, row.get("annotation"))

    return read


_FORMS: list[tuple[frozenset[str], Callable[[dict[str, Any], Place], Answer]]] = [
    (frozenset({"question_id", "text"}), _llava),
    (frozenset({"questionId", "prediction"}), _gqa),
    (frozenset({"image_id", "caption"}), _coco),
    (frozenset({"answer", "gt_bbox", "hw"}), _grounding),
    (frozenset({"answer", "gt_answers", "image_path"}), _choice),
    (frozenset({"question_id", "answer"}), _vqa("question_id")),
    (frozenset({"questionId", "answer"}), _vqa("questionId")),
    (frozenset({"image", "answer"}), _vqa("image")),
]


def _id(row: dict[str, Any], key: str, place: Place) -> str:
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise place.error(f"`{key}`", f"is {value!r:.200}", "An id is a text or a number.")
    return str(value)


def _text(row: dict[str, Any], key: str, place: Place) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise place.error(f"`{key}`", f"is {value!r:.200}, not a text", "A prediction is a text.")
    return value
