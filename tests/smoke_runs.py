"""Small whole runs on the tiny model, and how two of them are compared."""

from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config

STAGES = 3
CALLBACKS = (
    "callbacks=[{_target_: callbacks.Consolidate}, {_target_: callbacks.StageCost}, {_target_: callbacks.BackwardTransfer},"
    " {_target_: kill.KillAt}, {_target_: callbacks.StageCheckpoint, every_n_steps: 2}]"
)


def small_experiment(smoke_root: Path, out: Path, *overrides: str) -> ExperimentConfig:
    """The smoke experiment with fewer rows, for a given run directory."""
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
