"""A run that stops: by a signal, by a loss that is no number, or because another run has its directory."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kill
import lightning as L
import pytest
import torch
from smoke_runs import CALLBACKS, adapters, assert_same_run, curves

from mcit_lightning.checkpoints import read_checkpoint, write_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.locks import DirectoryLock
from mcit_lightning.rundir import RunDirectory
from mcit_lightning.runner import run
from mcit_lightning.signals import STOP, StoppedBySignal


class Diverge(L.Callback):
    """Breaks the weights before a step, as an update that is too large does."""

    def __init__(self, stage: str, step: int) -> None:
        self.stage, self.step = stage, step

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if (pl_module.stage.name, trainer.global_step) == (self.stage, self.step):
            with torch.no_grad():
                next(p for p in pl_module.parameters() if p.requires_grad).fill_(float("nan"))


def with_callback(node: str, **checkpoint: Any) -> str:
    """The callbacks of `smoke_runs`, with one more before the checkpoint's."""
    text = CALLBACKS.replace("{_target_: callbacks.StageCheckpoint", f"{node}, {{_target_: callbacks.StageCheckpoint")
    return text.replace(
        "every_n_steps: 2", ", ".join(["every_n_steps: 2", *(f"{k}: {v}" for k, v in checkpoint.items())])
    )


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    yield
    assert [signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)] == before
    assert not STOP.deferring


SLURM = {"JOB_ID": 7, "JOB_NAME": "run", "NTASKS": 1, "PROCID": 0, "LOCALID": 0, "NODEID": 0}


@pytest.mark.parametrize(
    ("point", "saved", "slurm"),
    [
        (("batch", 1, 1), 2, True),  # which is saved anyway
        (("batch", 0, 2), 4, False),  # noticed at the last batch of an epoch
        (("epoch", 0, 0), 4, False),
        (("end", 1), None, False),  # final.ckpt is written first
        (("test", 1, 0), None, True),
        (("test", -1, 1), None, False),
        (("setup", 1), None, False),  # nothing trains yet: the process stops at once
    ],
    ids=str,
)
def test_a_signal_stops_the_run_and_the_same_command_continues(
    point: tuple[Any, ...],
    saved: int | None,
    slurm: bool,
    experiment: Callable[..., ExperimentConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    signum = signal.SIGUSR1 if slurm else signal.SIGTERM
    for name, value in SLURM.items() if slurm else ():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(kill, "POINT", point)
    monkeypatch.setattr(kill, "SIGNUM", signum)
    config = experiment(tmp_path / "run")
    with pytest.raises(StoppedBySignal) as stop:
        run(config)
    assert stop.value.code == 128 + signum and stop.value.name == signum.name
    folder = tmp_path / f"run/stage_{point[1] + 1:02d}"
    assert not list((tmp_path / "run").rglob("hpc_ckpt*"))
    if saved is not None:
        assert read_checkpoint(folder / "last.ckpt")["global_step"] == saved
    assert (folder / "final.ckpt").exists() == (point in [("end", 1), ("test", 1, 0)])
    run(config)
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_signal_between_two_saves_loses_no_step(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "POINT", ("batch", 1, 5))
    monkeypatch.setattr(kill, "SIGNUM", signal.SIGTERM)
    config = experiment(tmp_path / "run", CALLBACKS.replace("every_n_steps: 2", "every_n_steps: 50"))
    with pytest.raises(StoppedBySignal):
        run(config)
    assert read_checkpoint(tmp_path / "run/stage_02/last.ckpt")["global_step"] == 7
    run(config)
    assert curves(tmp_path / "run") == curves(uninterrupted)
    left, right = adapters(tmp_path / "run"), adapters(uninterrupted)
    assert all(torch.equal(value, right[stage][name]) for stage in left for name, value in left[stage].items())


def test_lightnings_requeue_checkpoints_are_not_loaded(
    experiment: Callable[..., ExperimentConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    config = experiment(tmp_path / "run")
    monkeypatch.setattr(kill, "POINT", ("batch", 1, 2))
    with pytest.raises(kill.Killed):
        run(config)
    checkpoint = read_checkpoint(tmp_path / "run/stage_01/final.ckpt")
    checkpoint["state_dict"] = {name: value + 1 for name, value in checkpoint["state_dict"].items()}
    for folder in ("stage_02", "stage_03"):
        (tmp_path / "run" / folder).mkdir(exist_ok=True)
        write_checkpoint(checkpoint, tmp_path / "run" / folder / "hpc_ckpt_1.ckpt")
    run(config)
    assert "the run does not use Lightning's requeue checkpoints" in caplog.text
    assert (tmp_path / "run/stage_02/unused_requeue_1.ckpt").is_file()
    assert_same_run(uninterrupted, tmp_path / "run")


@pytest.mark.parametrize(("step", "every"), [(3, 2), (4, 50), (7, 50)])
def test_a_loss_that_is_no_number_stops_the_run_and_saves_nothing(
    step: int, every: int, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    node = f"{{_target_: test_stopping.Diverge, stage: colours, step: {step}}}"
    overrides = ["zero_shot=false", "order=[colours]", f"trainer.log_every_n_steps={every}"]
    config = experiment(tmp_path / "run", with_callback(node), *overrides)
    with pytest.raises(
        ValueError, match=rf"stage 'colours' has diverged.*first in step {step + 1}.*optim\.lr.*out=DIR"
    ):
        run(config)
    assert not (tmp_path / "run/stage_01/final.ckpt").exists()
    checkpoint = read_checkpoint(tmp_path / "run/stage_01/last.ckpt")
    assert checkpoint["global_step"] <= step
    assert all(value.isfinite().all() for value in checkpoint["state_dict"].values())
    run(experiment(tmp_path / "free", with_callback(node, nonfinite="ignore"), *overrides))


def test_a_lock_is_not_kept_by_forked_children(tmp_path: Path) -> None:
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.acquire()
    ready, say = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(say, b"x")
        signal.pause()
    os.read(ready, 1)
    with pytest.raises(ValueError, match="another process is running"):
        second.acquire()
    first.release()  # the parent is gone, its loader worker is not yet
    second.acquire()
    second.release()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno
    import fcntl

    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    lock.release()
    assert "has no locks" in caplog.text


def test_leftovers_of_a_killed_process_are_removed(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    root = tmp_path / "run"
    (root / "predictions/stage_01").mkdir(parents=True)
    (root / "stage_01").mkdir()
    left = [
        root / ".state.json.12.tmp",
        root / "stage_01/.next.ckpt.12.tmp",
        root / "predictions/stage_01/.a.rank0.part",
    ]
    for path in left:
        path.write_bytes(b"half")
    RunDirectory(experiment(root)).close()
    assert not any(path.exists() for path in left)
