"""Files of captions and of answers that are not in the published forms."""

import json
from pathlib import Path
from typing import Any

import pytest

from mcit_lightning.config import DataConfig, TaskConfig
from mcit_lightning.data.coco import coco_captions, read_coco
from mcit_lightning.data.references import read_references
from mcit_lightning.data.splits import open_split


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"images": [{"id": 1}], "annotations": []}, r"images\[0\] has the file name None"),
        ({"images": [{"id": [], "file_name": "a"}], "annotations": []}, r"images\[0\]\.id is \[\]"),
        ({"images": [{"id": 1, "file_name": "a"}] * 2, "annotations": []}, r"images\[1\]\.id repeats 1"),
        ({"images": [], "annotations": [{"image_id": 1, "caption": "x"}]}, r"annotations\[0\]\.image_id is 1, but"),
        (
            {"images": [{"id": 1, "file_name": "a"}], "annotations": [{"image_id": 1, "caption": None}]},
            r"annotations\[0\]\.caption is None",
        ),
        ({"images": {}, "annotations": []}, "`images` is not a list of objects"),
        ({"rows": []}, "top level is not a list"),
    ],
)
def test_malformed_coco_files_are_refused(tmp_path: Path, content: Any, said: str) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"a\.json \(tasks\.t\.test\)") as error:
        read_coco(tmp_path / "a.json", "tasks.t.test", "test", lambda index, row: None)
    error.match(said)
    assert coco_captions({"annotations": []}, {}, "a") == []


def open_test(root: Path, **task: Any) -> None:
    open_split(DataConfig(root=str(root)), "task", TaskConfig(**task), "test", 0)


def test_an_image_without_captions_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"images": [{"id": 7, "file_name": "a.png"}], "annotations": []}))
    with pytest.raises(ValueError, match=r"a\.json, row 1 \(id '7'.*`answer` cannot be scored by exact_match: .*\[\]"):
        open_test(tmp_path, test="a.json")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("r.json", {"annotations": [{"question_id": 1}]}, r"annotations\[0\]"),
        ("r.json", {"data": [{"questionId": 1, "answers": [3]}]}, r"data\[0\]\.answers"),
        ("r.json", {"1": {"answers": "x"}}, "'1' is"),
        ("r.json", {"1": "no"}, "References are"),
        ("r.json", [{"question_id": 1, "text": "?"}], r"row 1 \(id '1', references\): `answer` is missing"),
        (
            "r.json",
            [{"question_id": 1, "text": "?", "answer": answer} for answer in "ab"],
            "row 2: repeats an id with another answer",
        ),
        ("r.parquet", [], "is no JSON"),
    ],
)
def test_malformed_references_are_refused(tmp_path: Path, name: str, content: Any, said: str) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"r\.\w+.*{said}"):
        read_references(tmp_path / name, "references")


def test_references_that_lack_a_question_refuse_its_row(tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps([{"question_id": 5, "text": "?", "answer": "a"}]))
    (tmp_path / "r.jsonl").write_text(json.dumps({"question_id": 4, "text": "?", "answer": "b"}))
    with pytest.raises(
        ValueError, match=r"test\.json, row 1 \(id '5'.*no answer in the file of references: .*question '5'"
    ):
        open_test(tmp_path, test="test.json", references="r.jsonl")
