"""Whole runs on the tiny model: the run directory, and resumption after a kill anywhere."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill
import pytest
import torch
from smoke_runs import STAGES, assert_same_run, curves

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.rundir import RunDirectory
from mcit_lightning.runner import run


def test_run_directory_holds_what_the_readme_says(uninterrupted: Path) -> None:
    names = {str(path.relative_to(uninterrupted)) for path in uninterrupted.rglob("*") if path.is_file()}
    expected = {"config.yaml", "state.json", "accuracy_matrix.csv", "results.json", "report.html"}
    expected |= {f"stage_{n:02d}/final.ckpt" for n in range(1, STAGES + 1)}
    order = ["colours", "shapes", "counts"]
    expected |= {f"predictions/stage_{n + 1:02d}/{task}.jsonl" for n in range(STAGES) for task in order[: n + 1]}
    expected |= {f"predictions/zero_shot/{task}.jsonl" for task in order}
    assert {name for name in names if not name.startswith("tensorboard/") and name != ".lock"} == expected
    state = json.loads((uninterrupted / "state.json").read_text())
    assert state["finished"] and state["steps"] == [8, 8, 4]


def test_results_hold_matrix_summary_and_cost(uninterrupted: Path) -> None:
    results = json.loads((uninterrupted / "results.json").read_text())
    matrix = results["matrix"]
    assert [[value is not None for value in row] for row in matrix] == [
        [True, False, False],
        [True, True, False],
        [True] * 3,
    ]
    assert len(results["zero_shot"]) == STAGES and None not in results["zero_shot"]
    assert results["summary"]["MFN"] == pytest.approx(sum(matrix[2]) / 3)
    assert [row["stage"] for row in results["cost"]] == ["colours", "shapes", "counts"]
    for row in results["cost"]:
        assert row["trainable_params"] > 0 and row["train_seconds"] > 0 and row["eval_seconds"] > 0
    rows = [
        json.loads(line) for line in (uninterrupted / "predictions/stage_02/colours.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 4 and {"question_id", "prompt", "text", "answer", "score", "task"} <= set(rows[0])
    assert sum(row["score"] for row in rows) / 4 * 100 == pytest.approx(matrix[1][0])


def test_training_curves_run_on_over_the_stages(uninterrupted: Path) -> None:
    steps = [step for key, events in curves(uninterrupted).items() if key.endswith(":train/loss") for step, _ in events]
    assert len(steps) == len(set(steps)) == 20 and sorted(steps) == list(range(min(steps), min(steps) + 20))


def test_checkpoints_hold_adapters_projector_and_structure_only(uninterrupted: Path) -> None:
    checkpoint = torch.load(uninterrupted / "stage_02/final.ckpt", weights_only=True)
    assert all(".lora_" in name or "multi_modal_projector" in name for name in checkpoint["state_dict"])
    assert [entry["stage"] for entry in checkpoint["mcit"]["structure"]] == ["colours", "shapes"]
    assert not checkpoint.get("optimizer_states")


POINTS: list[tuple[Any, ...]] = [
    ("test", -1, 1),  # zero-shot evaluation
    ("batch", 0, 0),  # before the first save
    ("batch", 0, 2),  # after a save, inside an epoch
    ("epoch", 0, 0),  # between two epochs
    ("batch", 1, 6),  # second epoch of the second stage
    ("epoch", 1, 1),  # after the last epoch, before the end-of-task work
    ("end", 1),  # inside the end-of-task work, before final.ckpt
    ("test", 1, 0),  # evaluation, inside the first task
    ("test", 2, 2),  # evaluation, two tasks done
    ("save", 1),  # evaluated, before state.json says so
]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("point", POINTS, ids=lambda point: "-".join(map(str, point)))
def test_killed_and_resumed_equals_uninterrupted(
    point: tuple[Any, ...],
    workers: int,
    experiment: Callable[..., ExperimentConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = experiment(tmp_path / "run", f"data.num_workers={workers}")
    if point[0] == "save":
        save = RunDirectory.save

        def killed_save(self: RunDirectory) -> None:
            if self.state.stage == point[1]:
                raise kill.Killed
            save(self)

        monkeypatch.setattr(RunDirectory, "save", killed_save)
    else:
        monkeypatch.setattr(kill, "POINT", point)
    with pytest.raises(kill.Killed):
        run(config)
    monkeypatch.undo()
    run(config)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_killed_twice_in_one_stage(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run")
    for point in (("batch", 1, 2), ("batch", 1, 6)):
        monkeypatch.setattr(kill, "POINT", point)
        with pytest.raises(kill.Killed):
            run(config)
    run(config)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_joint_fills_the_last_row_individual_the_diagonal_zero_shot_neither(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    def evaluated(name: str) -> tuple[list[list[bool]], bool]:
        results = run(experiment(tmp_path / name, f"strategy={{name: {name}}}", "zero_shot=false"))
        rows = results.matrix.to_dict()
        return [[value is not None for value in row] for row in rows["matrix"]], rows["zero_shot"] is not None

    none = [False] * 3
    assert evaluated("joint") == ([none, none, [True] * 3], False)
    assert evaluated("individual") == ([[i == j for j in range(3)] for i in range(3)], False)
    assert evaluated("zero_shot") == ([none, none, none], True)


def test_individual_starts_every_task_from_the_pretrained_model(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    one = run(experiment(tmp_path / "a", "strategy={name: individual}", "order=[shapes,counts]", "zero_shot=false"))
    two = run(
        experiment(tmp_path / "b", "strategy={name: individual}", "order=[colours,shapes,counts]", "zero_shot=false")
    )
    del one, two
    first = torch.load(tmp_path / "a" / "stage_01" / "final.ckpt", weights_only=True)["mcit"]["structure"]
    second = torch.load(tmp_path / "b" / "stage_02" / "final.ckpt", weights_only=True)["mcit"]["structure"]
    assert first == second  # the log starts over too: one plan, of this stage


def test_evaluate_all_gives_forward_transfer(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    results = run(experiment(tmp_path / "run", "evaluate=all", "tasks.colours.epochs=1", "tasks.shapes.epochs=1"))
    assert all(value is not None for row in results.matrix.to_dict()["matrix"] for value in row)
    assert results.summary["FWT"] is not None and results.summary["AVG"] is not None
