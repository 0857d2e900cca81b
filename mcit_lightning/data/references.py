"""Answers that a benchmark keeps in a file of its own, apart from the questions."""

from array import array
from pathlib import Path
from typing import Any

from mcit_lightning.data.coco import coco_captions, coco_images, is_object, read_json
from mcit_lightning.data.readers import check_file, file_format, read_file
from mcit_lightning.data.records import Place, parse_parts

Entry = tuple[Any, dict[str, Any]]
"""An answer, and keys of the row that a metric may need (`choices`)."""


class References:
    """Answers by question id, or, for COCO captions, by the number of the question's row.

    Args:
        source: the file.
        entries: id to answer and further keys.
        by_line: the id is the 1-based number of the test row, as in UCIT's `val_coco_type_3000.json`.
    """

    def __init__(self, source: str, entries: dict[str, Entry], *, by_line: bool = False) -> None:
        self.source = source
        self.entries = entries
        self.by_line = by_line

    def __len__(self) -> int:
        return len(self.entries)

    def find(self, identity: str, row: int) -> Entry:
        """The answer to a question.

        Args:
            identity: the question's id.
            row: 0-based number of its row in the test file.

        Raises:
            KeyError: there is none; the argument says what was looked for.
        """
        name = str(row + 1) if self.by_line else identity
        if name not in self.entries:
            raise KeyError(f"{self.source} has no {'image' if self.by_line else 'question'} {name!r}")
        return self.entries[name]


def read_references(path: Path, key: str) -> References:
    """Read answers in any of the published forms.

    * COCO captions, `{"images", "annotations": [{"image_id", "caption"}]}` (UCIT, VizWiz-Captions): lists of captions;
    * VQA annotations, `{"annotations": [{"question_id", "answers": [{"answer"}]}]}` (VQAv2, VizWiz): ten answers;
    * `{"data": [{"question_id" or "questionId", "answers": [...]}]}` (TextVQA, DocVQA): a list of answers;
    * `{"<id>": {"answer", ...}}` (GQA's questions, ScienceQA's problems with their `choices`);
    * test rows, as a JSON array or JSON lines.

    Args:
        path: the file.
        key: the configuration key or option that names it, for messages.

    Raises:
        ValueError: it is none of these, or an entry is malformed.
    """
    check_file(path, key)
    kind = file_format(path.name, "auto", key)
    if kind == "hf":
        raise ValueError(f"{key}: {path} is no JSON. Give the references as JSON or JSON lines.")
    if kind == "jsonl" or not is_object(path):
        return _rows(path, kind, key)
    content = read_json(path, key)
    source = f"{path} ({key})"
    if "images" in content and "annotations" in content:
        images = coco_images(content, source)
        captions: dict[str, Entry] = {str(identity): ([], {}) for identity in images}
        for identity, caption in coco_captions(content, images, source):
            captions[str(identity)][0].append(caption)
        return References(str(path), captions, by_line=True)
    for name in ("annotations", "data"):
        if isinstance(content.get(name), list):
            return References(str(path), _answers(content[name], f"{source}: {name}"))
    return References(str(path), _by_id(content, source))


def _rows(path: Path, kind: Any, key: str) -> References:
    entries: dict[str, Entry] = {}
    repeated = array("q")

    def visit(index: int, row: Any) -> None:
        parts = parse_parts(row, Place(str(path), key, index), split="test")
        if parts.id in entries and entries[parts.id] != (parts.reference, parts.extra):
            repeated.append(index)
        entries[parts.id] = (parts.reference, parts.extra)

    read_file(path, kind, key, visit)
    if repeated:
        raise ValueError(
            f"{path} ({key}), row {repeated[0] + 1}: repeats an id with another answer ({len(repeated)} such rows), so "
            "it is not clear which answer belongs to a question. Number the questions anew."
        )
    return References(str(path), entries)


def _answers(items: list[Any], source: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for number, item in enumerate(items):
        identity = None if not isinstance(item, dict) else item.get("question_id", item.get("questionId"))
        answers = None if identity is None else item.get("answers")
        if isinstance(identity, bool) or not isinstance(identity, int | str) or not isinstance(answers, list):
            raise ValueError(f"{source}[{number}] is {item!r:.200}. It must have `question_id` and the list `answers`.")
        texts = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{source}[{number}].answers is {answers!r:.200}. Answers are texts or have `answer`.")
        entries[str(identity)] = (texts, {})
    return entries


def _by_id(content: dict[str, Any], source: str) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for identity, item in content.items():
        if not isinstance(item, dict) or item.get("answer") is None:
            raise ValueError(
                f"{source}: {identity!r} is {item!r:.200}. References are COCO captions, VQA annotations, "
                '`{"data": [...]}`, `{"<id>": {"answer": ...}}` or test rows.'
            )
        entries[identity] = (item["answer"], {key: item[key] for key in ("choices", "isBalanced") if key in item})
    return entries
