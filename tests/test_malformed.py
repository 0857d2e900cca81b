"""Rows broken at random never get into a run: each is refused with its place or left out and counted, and what is kept can be
read, encoded as text and scored."""

import copy
import json
import logging
import random
import re
from pathlib import Path
from typing import Any

import pytest

from mcit_lightning.config import DataConfig, TaskConfig
from mcit_lightning.data.splits import TaskSplit, open_split
from mcit_lightning.evaluation.metrics import METRICS, build_metric, get_metric
from mcit_lightning.evaluation.metrics.caption import CaptionMetric

TRAIN: list[dict[str, Any]] = [
    {"id": "a", "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]},
    {
        "id": 3,
        "image": "1.png",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat?"},
            {"from": "gpt", "value": "A"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "Yes"},
        ],
    },
    {
        "id": "b",
        "image": ["1.png", "2.png"],
        "conversations": [{"from": "user", "value": "<image><image>"}, {"from": "assistant", "value": ""}],
    },
]
TEST: dict[str, list[dict[str, Any]]] = {
    "exact_match": [{"question_id": "1", "image": "1.png", "text": "<image>\nWhat?", "answer": "cat"}],
    "contains": [{"question_id": 2, "text": "What?", "answer": ["cat", "dog"]}],
    "option_letter": [{"image": "1.png", "question": "Which?", "choices": ["x", "y"], "answer": 1}],
    "scienceqa": [{"question_id": "3", "text": "Which?", "answer": "B", "choices": ["x", "y", "z"]}],
    "vqa_soft": [{"question_id": 4, "question": "What?", "answer": ["a"] * 5 + [{"answer": "b"}] * 5}],
    "iou": [{"image": "2.png", "sent": "a man", "bbox": [1, 2, 30, 40], "width": 64, "height": 48, "knowledge": "k"}],
    "coin_grounding": [{"question_id": 5, "text": "Where?", "answer_bbox": "[0.1,0.2,0.3,0.4]", "size": [64, 48]}],
    "anls": [{"question_id": 6, "text": "Date?", "answer": ["5 May", "May 5"]}],
    "ocrbench": [{"question_id": 7, "text": "Read", "answer": ["A"], "answer_type": "Doc-oriented VQA"}],
    "science": [{"question_id": 8, "image": "1.png", "text": "Which states are blue?", "answer": "Ohio,Utah"}],
    "cv_bench": [{"question_id": 9, "text": "How many?", "answer": "(B)", "type": "2D", "task": "Count"}],
    "finvis": [{"id": "c", "conversations": TRAIN[0]["conversations"]}],
}
JUNK: list[Any] = [
    *(
        None,
        "",
        "x",
        " ",
        0,
        -1,
        3,
        10**30,
        0.5,
        float("nan"),
        float("inf"),
        True,
        [],
        [None],
        [[]],
        {},
        {"answer": []},
    ),
    *(
        "<image>",
        "[1,2,3,4]",
        "A",
        ["A", 1],
        [1, 2, 3, 4],
        ["a"] * 10,
        "\0",
        "../..",
        "é" * 50,
        {"from": "gpt", "value": 1},
    ),
]
ANSWERS = [
    "",
    "A",
    "(b)",
    "x",
    "[1,2,3,4]",
    "[[nan, inf, 1e400, 2]]",
    "1",
    "Ohio, Utah",
    "\n",
    "é\0\ud800",
    "9" * 400,
    ". . .",
]


def mutated(draw: random.Random, row: dict[str, Any]) -> Any:
    """A copy of a row in which up to three things are replaced, removed, renamed or doubled."""
    row = copy.deepcopy(row)
    if draw.random() < 0.05:
        return draw.choice(JUNK)
    for _ in range(draw.randint(1, 3)):
        place, key = draw.choice(list(places(row)))
        kind = draw.random()
        if kind < 0.55:
            place[key] = copy.deepcopy(draw.choice(JUNK))
        elif kind < 0.75:
            del place[key]
        elif isinstance(place, dict):
            place[draw.choice(["image", "images", "answer", "text", "choices", "question", "x"])] = place.pop(key)
        else:
            place.append(copy.deepcopy(place[key]))
        if not row:
            break
    return row


def places(value: Any) -> Any:
    """Every container in a value with each of its keys."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], dict | list):
            yield from places(value[key])


def attempt(root: Path, split: Any, **task: Any) -> TaskSplit | str:
    """The split, or the message with which it is refused."""
    try:
        return open_split(DataConfig(root=str(root)), "t", TaskConfig(**task), split, 0)
    except ValueError as error:
        return str(error)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("1.png", "2.png"):
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize("metric", [None, *TEST])
@pytest.mark.parametrize("seed", range(3))
def test_malformed_rows_are_refused_or_counted(
    root: Path, metric: str | None, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    draw = random.Random(f"{metric} {seed}")
    split: Any = "train" if metric is None else "test"
    originals = TRAIN if metric is None else TEST[metric]
    rows = [mutated(draw, draw.choice(originals)) for _ in range(60)]
    rows += [dict(row, question_id=f"good{n}") for n, row in enumerate(originals)]
    path = root / f"rows.{draw.choice(['json', 'jsonl'])}"
    path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    mode: Any = "published" if seed == 0 and metric is not None else "fixed"
    task: dict[str, Any] = {split: path.name, "metric": metric or "exact_match", "metric_mode": mode}
    with pytest.raises(ValueError, match=rf"rows\.jsonl?, row \d+ \(.*tasks\.t\.{split}\): .*\S") as refusal:
        open_split(DataConfig(root=str(root)), "t", TaskConfig(**task), split, 0)
    assert len(str(refusal.value)) < 1200
    opened = attempt(root, split, **task, malformed="skip")
    if isinstance(opened, str):  # an image that is nowhere is refused all the same
        assert re.search(r"rows\.jsonl?, row \d+ \(tasks\.t\.\w+\): `image` names .*, but there is no file", opened)
        return
    assert opened.skipped > 0 and len(opened) + opened.skipped == len(rows)
    assert f"{opened.skipped} of {len(rows)} rows are malformed" in caplog.text
    scorer = None if metric is None else build_metric(metric, mode)
    for sample in opened:
        json.dumps([sample.id, sample.turns], ensure_ascii=False).encode("utf-8")
        assert all(isinstance(text, str) for _, text in sample.turns)
        if scorer is not None:
            for answer in ANSWERS:
                assert -1 <= scorer.score(answer, sample.reference, sample.extra) <= 1


def test_no_answer_breaks_a_metric_that_accepts_the_reference() -> None:
    draw = random.Random(0)
    extras = [
        {key: copy.deepcopy(draw.choice(JUNK)) for key in ("choices", "width", "height", "size", "image", "text")}
        for _ in range(40)
    ]
    extras += [
        {
            "choices": ["a", "b", "c"],
            "width": 4,
            "height": 4,
            "image": "TQA_1",
            "text": "?",
            "answer_type": "Doc-oriented VQA",
        }
    ]
    checked = 0
    for name in METRICS:
        if issubclass(get_metric(name), CaptionMetric):
            continue
        for mode in ("fixed", "published"):
            scorer = build_metric(name, mode)  # type: ignore[arg-type]
            for extra in extras:
                for reference in JUNK:
                    try:
                        scorer.check(reference, extra)
                    except ValueError:
                        continue
                    checked += 1
                    for answer in ANSWERS:
                        scorer.score(answer, reference, extra)
    assert checked > 500


@pytest.mark.parametrize("seed", range(4))
def test_files_cut_or_garbled_anywhere_are_refused(root: Path, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    draw = random.Random(seed)
    for name in ("rows.json", "rows.jsonl"):
        whole = ("\n".join(map(json.dumps, TRAIN)) if name.endswith("l") else json.dumps(TRAIN, indent=1)).encode()
        for _ in range(60):
            content = bytearray(whole)
            if draw.random() < 0.5:
                del content[draw.randrange(len(content)) :]
            else:
                content[draw.randrange(len(content))] = draw.randrange(256)
            (root / name).write_bytes(content)
            opened = attempt(root, "train", train=name)
            if isinstance(opened, str):
                assert "tasks.t.train" in opened and name in opened
            else:
                assert [sample.turns for sample in opened]
