"""Held-out tasks: evaluated with the pretrained model and after every stage, never trained, outside of the matrix."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.held_out import HeldOut
from mcit_lightning.evaluation.report_held_out import held_out_section
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run


def test_a_run_evaluates_and_never_trains_them(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    root = tmp_path / "run"
    config = experiment(
        root, "order=[colours,shapes]", "held_out=[counts]", "tasks.counts.train=null", "tasks.counts.val=null"
    )
    run(config)
    results = Results.load(root)
    assert results.tasks == ["colours", "shapes"] and results.matrix.filled_rows() == [0, 1]
    assert results.held_out.metrics == {"counts": "exact_match"}
    assert {stage: list(row) for stage, row in results.held_out.scores.items()} == {
        stage: ["counts"] for stage in (0, 1, 2)
    }
    for folder in ("zero_shot", "stage_01", "stage_02"):
        lines = (root / f"predictions/{folder}/counts.jsonl").read_text().splitlines()
        assert len(lines) == 4
    assert "Held-out tasks" in (root / "report.html").read_text(encoding="utf-8")
    events = EventAccumulator(str(root / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("held_out/counts")] == [0, 1, 2]


def test_round_trip_and_retention() -> None:
    held = HeldOut({"pope": "exact_match"})
    held.set(0, "pope", 80.0)
    held.set(1, "pope", 77.5)
    again = HeldOut.from_dict(json.loads(json.dumps(held.to_dict())))
    assert again == held
    assert again.retention(0) == {"pope": "77.5 (−2.5)"} and again.retention(None) == {"pope": "80.0"}
    results = Results("e", "s", "b", 0, ["a"], {"a": "exact_match"}, held_out=held)
    page = held_out_section(results)
    assert "pope (exact_match)" in page and "77.5 (−2.5)" in page
    assert held_out_section(Results("e", "s", "b", 0, ["a"], {"a": "exact_match"})) == ""


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["order=[colours,shapes]", "held_out=[shapes]"], "held_out: shapes is in order too"),
        (["order=[colours]", "held_out=[shapes,shapes]"], "held_out: names a task twice"),
        (["order=[colours]", "held_out=[shape]"], "held_out: no task 'shape'. Did you mean 'shapes'?"),
        (["order=[colours]", "held_out=[counts]", "tasks.counts.test=null"], "tasks.counts.test: is not set"),
    ],
)
def test_wrong_ones_are_refused(overrides: list[str], named: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(experiments_dir() / "smoke.yaml", overrides)
    assert named in str(error.value)


def test_without_an_order_the_others_are_trained() -> None:
    config = load_config(experiments_dir() / "smoke.yaml", ["order=[]", "held_out=[counts]"])
    assert config.order == ["colours", "shapes"]
