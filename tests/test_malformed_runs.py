"""Whole runs on files in which rows are broken at random: they end, and every row that was left out is counted."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_malformed import mutated

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.splits import open_split
from mcit_lightning.evaluation.predictions import read_predictions
from mcit_lightning.evaluation.results import Results
from mcit_lightning.runner import run

Experiment = Callable[..., ExperimentConfig]


def spoil(path: Path, draw: random.Random) -> int:
    """Put rows with something broken at random between the rows of a file; how many. Some turn out to be as they should be."""
    rows: list[Any] = json.loads(path.read_text())
    broken = [mutated(draw, draw.choice(rows)) for _ in range(12)]
    for row in broken:
        if isinstance(row, dict) and isinstance(row.get("image"), str):
            row["image"] = rows[0]["image"]  # a picture that is nowhere is refused whatever `malformed` says
    rows += broken
    draw.shuffle(rows)
    path.write_text(json.dumps(rows))
    return len(rows)


@pytest.mark.parametrize("seed", range(2))
def test_runs_end_and_count_what_they_left_out(
    seed: int, experiment: Experiment, smoke_root: Path, tmp_path: Path
) -> None:
    draw = random.Random(seed)
    root = tmp_path / "data"
    for task in ("colours", "shapes"):
        shutil.copytree(smoke_root / task, root / task)
    total = {
        (task, split): spoil(root / task / f"{split}.json", draw)
        for task in ("colours", "shapes")
        for split in ("train", "test")
    }
    config = experiment(tmp_path / "run")
    tasks = {name: replace(config.tasks[name], malformed="skip") for name in ("colours", "shapes")}
    data = replace(config.data, root=str(root), limit_train=None, limit_val=None, limit_test=None)
    config = replace(config, data=data, tasks=tasks, order=list(tasks), zero_shot=False)
    splits = {key: open_split(data, key[0], tasks[key[0]], key[1], config.seed) for key in total}  # type: ignore[arg-type]
    run(config)
    results = Results.load(tmp_path / "run")
    page = (tmp_path / "run/report.html").read_text()
    for (task, split), rows in total.items():
        counts = results.notes["data"][task]
        assert counts[f"{split}_rows"] + counts.get(f"{split}_malformed", 0) == rows
        assert counts.get(f"{split}_malformed", 0) == splits[task, split].skipped > 0
        assert f"{counts[f'{split}_malformed']} {split} rows" in page
        if split == "test":
            assert len(read_predictions(tmp_path / "run", "stage_02", task)) == len(splits[task, split])


def test_a_run_refuses_them_by_default(experiment: Experiment, smoke_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(smoke_root / "colours", root / "colours")
    rows = json.loads((root / "colours/test.json").read_text())
    del rows[5]["answer"]
    (root / "colours/test.json").write_text(json.dumps(rows))
    config = experiment(tmp_path / "run")
    config = replace(config, data=replace(config.data, root=str(root)), order=["colours"])
    with pytest.raises(ValueError, match=r"colours/test\.json, row 6 \(.*tasks\.colours\.test\): `answer` is missing"):
        run(config)
