"""Other Lightning loggers beside TensorBoard: steps go on over the stages, and the forgetting curves are there."""

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.runner import run
from mcit_lightning.stage_logger import StageLogger, build_loggers, check_loggers

CSV = "lightning.pytorch.loggers.CSVLogger"


def test_a_run_fills_a_csv_logger(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    root = tmp_path / "run"
    run(experiment(root, f"loggers=[{{_target_: {CSV}, name: null}}]", "order=[colours,shapes]", "zero_shot=false"))
    (file,) = root.glob("loggers/**/metrics.csv")
    with file.open(encoding="utf-8", newline="") as opened:
        rows = list(csv.DictReader(opened))
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == sorted(set(steps)) and len(steps) == 16, (
        "two stages of two epochs of four batches, one after the other"
    )
    curves = [row for row in rows if row["stage"]]
    assert [float(row["stage"]) for row in curves] == [1.0, 2.0]
    matrix = Results.load(root).matrix.scores
    assert float(curves[1]["forgetting/colours"]) == matrix[1][0]
    assert curves[0]["forgetting/shapes"] == "" and float(curves[0]["forgetting/colours"]) == matrix[0][0]


def test_steps_are_moved_by_the_offset(tmp_path: Path) -> None:
    (logger,) = build_loggers([{"_target_": CSV, "name": "x"}], tmp_path)
    assert isinstance(logger, StageLogger) and isinstance(logger.inner, CSVLogger)
    logger.step_offset = 10
    logger.log_metrics({"a": 1.0}, 3)
    logger.save()
    assert (tmp_path / "loggers/x/version_0/metrics.csv").read_text().split() == ["a,step", "1.0,13"]


@pytest.mark.parametrize(
    ("node", "named"),
    [
        ({"name": "x"}, "loggers[0]: needs a '_target_'"),
        ({"_target_": "callbacks.StageCost"}, "is not a Lightning logger"),
        ({"_target_": CSV, "nmae": "x"}, "loggers[0].nmae: unknown argument of CSVLogger. Did you mean 'name'?"),
    ],
)
def test_wrong_loggers_are_refused(node: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError) as error:
        check_loggers([node])
    assert named in str(error.value)


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lightning.pytorch.loggers.wandb")
    try:
        import wandb  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"loggers\[0\]: .*WandbLogger cannot be made: .*wandb"):
            build_loggers([{"_target_": "lightning.pytorch.loggers.WandbLogger", "project": "p"}], tmp_path)
