"""Whole runs on the tiny model: the run directory, resumption after a kill anywhere, and what is refused."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import kill
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.rundir import RunDirectory
from mcit_lightning.runner import run

STAGES = 3
CALLBACKS = (
    "callbacks=[{_target_: callbacks.Consolidate}, {_target_: callbacks.StageCost}, {_target_: callbacks.BackwardTransfer},"
    " {_target_: kill.KillAt}, {_target_: callbacks.StageCheckpoint, every_n_steps: 2}]"
)


@pytest.fixture(scope="session")
def experiment(smoke_root: Path) -> Callable[..., ExperimentConfig]:
    """A function that makes the smoke experiment with fewer rows, for a given run directory."""

    def make(out: Path, *overrides: str) -> ExperimentConfig:
        small = [
            f"data.root={smoke_root}",
            "prepare=null",
            f"out={out}",
            "data.limit_train=16",
            "data.limit_test=4",
            "data.limit_val=4",
            "data.eval_batch_size=2",
            "tasks.colours.epochs=2",
            "tasks.shapes.epochs=2",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            "trainer.log_every_n_steps=1",
            CALLBACKS,
        ]
        return load_config(experiments_dir() / "smoke.yaml", [*small, *overrides])

    return make


def adapters(root: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Stage folder -> the weights in its final checkpoint."""
    return {
        path.parent.name: torch.load(path, weights_only=True)["state_dict"]
        for path in sorted(root.glob("stage_*/final.ckpt"))
    }


def curves(root: Path) -> dict[str, list[tuple[int, float]]]:
    """Every scalar of the run's TensorBoard folder as (step, value), timings left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for folder in {path.parent for path in (root / "tensorboard").rglob("events.*")}:
        accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        for tag in accumulator.Tags()["scalars"]:
            if "second" not in tag and "memory" not in tag:
                key = f"{folder.relative_to(root)}:{tag}"
                found[key] = [(event.step, event.value) for event in accumulator.Scalars(tag)]
    return found


def predictions(root: Path) -> dict[str, str]:
    return {str(path.relative_to(root)): path.read_text() for path in sorted(root.glob("predictions/**/*.jsonl"))}


def assert_same_run(first: Path, second: Path) -> None:
    left, right = adapters(first), adapters(second)
    assert left.keys() == right.keys() == {f"stage_{n:02d}" for n in range(1, STAGES + 1)}
    for stage in left:
        assert left[stage].keys() == right[stage].keys()
        for name, value in left[stage].items():
            assert torch.equal(value, right[stage][name]), (stage, name)
    assert Results.load(first).matrix.to_dict() == Results.load(second).matrix.to_dict()
    assert (first / "accuracy_matrix.csv").read_text() == (second / "accuracy_matrix.csv").read_text()
    assert predictions(first) == predictions(second)
    assert curves(first) == curves(second)


@pytest.fixture(scope="session")
def uninterrupted(experiment: Callable[..., ExperimentConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(experiment(root))
    return root


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
    ("test", 1, 0),  # evaluation, first task done
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


def test_a_finished_run_is_not_started_over(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"finished.*overwrite=true.*out=DIR"):
        run(experiment(uninterrupted))


def test_overwrite_starts_over(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    short = ["order=[colours]", "zero_shot=false", "tasks.colours.epochs=1"]
    run(experiment(tmp_path / "run", *short))
    (tmp_path / "run" / "stage_01" / "leftover").touch()
    run(experiment(tmp_path / "run", *short, "overwrite=true"))
    assert not (tmp_path / "run" / "stage_01" / "leftover").exists()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"]


def test_a_changed_config_is_refused_and_named(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "POINT", ("batch", 0, 2))
    with pytest.raises(kill.Killed):
        run(experiment(tmp_path / "run", "zero_shot=false"))
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.01 -> 0\.02"):
        run(experiment(tmp_path / "run", "zero_shot=false", "optim.lr=0.02"))
    run(experiment(tmp_path / "run", "zero_shot=false", "trainer.log_every_n_steps=2"))


def test_overwrite_continues_an_interrupted_run_of_the_same_configuration(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run", "overwrite=true")
    monkeypatch.setattr(kill, "POINT", ("batch", 1, 6))
    with pytest.raises(kill.Killed):
        run(config)
    before = (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns == before
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_stage_whose_checkpoint_is_lost_is_done_again(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run")
    monkeypatch.setattr(kill, "POINT", ("batch", 2, 2))
    with pytest.raises(kill.Killed):
        run(config)
    (tmp_path / "run/stage_02/final.ckpt").write_bytes(b"cut short")
    (tmp_path / "run/stage_03/last.ckpt").unlink()
    with pytest.raises(ValueError, match=r"stage_02/final\.ckpt: cannot be read.*delete the file"):
        run(config)
    (tmp_path / "run/stage_02/final.ckpt").unlink()
    run(config)
    left, right = adapters(uninterrupted), adapters(tmp_path / "run")
    for stage in left:
        assert all(torch.equal(value, right[stage][name]) for name, value in left[stage].items()), stage
    assert Results.load(uninterrupted).matrix.to_dict() == Results.load(tmp_path / "run").matrix.to_dict()


def test_a_checkpoint_of_another_stage_is_refused(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run")
    monkeypatch.setattr(kill, "POINT", ("batch", 1, 6))
    with pytest.raises(kill.Killed):
        run(config)
    (tmp_path / "run/stage_02/final.ckpt").write_bytes((tmp_path / "run/stage_01/final.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"stage_02/final\.ckpt: is of stage 'colours', not of 'shapes'.*delete it"):
        run(config)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_lost_results_are_refused_and_the_remedy_works(
    damage: str,
    experiment: Callable[..., ExperimentConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = experiment(tmp_path / "run")
    monkeypatch.setattr(kill, "POINT", ("batch", 2, 2))
    with pytest.raises(kill.Killed):
        run(config)
    results = tmp_path / "run/results.json"
    results.write_text("{") if damage == "damaged" else results.unlink()
    with pytest.raises(ValueError, match=r"results\.json.*Delete state\.json and results\.json"):
        run(config)
    results.unlink(missing_ok=True)
    (tmp_path / "run/state.json").unlink()
    trained = (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns == trained
    assert Results.load(uninterrupted).matrix.to_dict() == Results.load(tmp_path / "run").matrix.to_dict()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.targets={language: [qq_proj]}", "'qq_proj' matches no linear"),
        ("trainer.precision=bf17", "bf17"),
        ("trainer.devices=two", "two"),
        ("trainer.accelerator=tpuu", "tpuu"),
        ("trainer.strategy=dpp", "dpp"),
        ("trainer.gradient_clip_val=abc", "abc"),
    ],
)
def test_a_wrong_value_shows_before_any_evaluation(
    override: str, message: str, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(experiment(tmp_path / "run", override))
    assert not (tmp_path / "run/predictions").exists()


def test_projector_only_training_accepts_text_only_batches(
    experiment: Callable[..., ExperimentConfig], smoke_root: Path, tmp_path: Path
) -> None:
    rows = json.loads((smoke_root / "colours/train.json").read_text())[:8]
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "").strip()
    (tmp_path / "train.json").write_text(json.dumps(rows))
    overrides = ["order=[colours]", f"tasks.colours.train={tmp_path}/train.json", "strategy.targets={vision: [q_proj]}"]
    results = run(experiment(tmp_path / "run", *overrides, "zero_shot=false"))
    assert results.matrix.scores[0][0] is not None


def test_a_folder_with_other_files_is_refused(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex.*out=DIR"):
        run(experiment(tmp_path, "overwrite=true"))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_second_run_in_the_same_directory_is_refused(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    config = experiment(tmp_path / "run")
    first = RunDirectory(config)
    with pytest.raises(ValueError, match="another process is running"):
        RunDirectory(config)
    first.close()
    RunDirectory(config).close()


def test_a_damaged_or_foreign_checkpoint_is_one_clear_error(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run", "zero_shot=false")
    monkeypatch.setattr(kill, "POINT", ("batch", 0, 2))
    with pytest.raises(kill.Killed):
        run(config)
    last = tmp_path / "run" / "stage_01" / "last.ckpt"
    good = last.read_bytes()
    last.write_bytes(good[: len(good) // 2])
    with pytest.raises(ValueError, match=r"last\.ckpt: cannot be read.*delete the file"):
        run(config)
    last.write_bytes((uninterrupted / "stage_01" / "final.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"belongs to run"):
        run(config)
    last.write_bytes(good)
    run(config)


def test_a_damaged_state_is_one_clear_error(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"state\.json: is damaged.*Delete state.json and results.json.*overwrite=true"
    ):
        run(experiment(tmp_path / "run"))


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/sys").is_dir(), reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_one_clear_error(experiment: Callable[..., ExperimentConfig]) -> None:
    with pytest.raises(OSError, match=r"cannot write the run directory.*out=DIR"):
        run(experiment(Path("/proc/sys/mcit_run")))


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
