"""The run directory: which run it holds, how far that run is, and what a restart may change."""

import fcntl
import hashlib
import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from lightning.pytorch.utilities import rank_zero_only

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.files import write_atomic
from mcit_lightning.loading import flatten, to_yaml
from mcit_lightning.stages import ZERO_SHOT, Stage

logger = logging.getLogger(__name__)

OWN_FILES = (
    "config.yaml",
    "state.json",
    "accuracy_matrix.csv",
    "results.json",
    "report.html",
    "predictions",
    "tensorboard",
    "features",
)
MAY_CHANGE = (
    "out",
    "overwrite",
    "dry_run",
    "data.num_workers",
    "trainer.accelerator",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.strategy",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
)
"""Keys that may differ when a run continues, because they do not change what it computes."""


@dataclass
class RunState:
    """How far a run is; `state.json`, replaced atomically after every stage."""

    run_id: str
    zero_shot: bool = False
    """The pretrained model has been evaluated."""
    steps: list[int] = field(default_factory=list)
    """Optimizer steps of each finished stage (trained and evaluated)."""
    finished: bool = False

    @property
    def stage(self) -> int:
        """Index of the first stage that is not finished."""
        return len(self.steps)


EVALUATE_AGAIN = (
    "Delete state.json and results.json: finished stages are then evaluated again, but not trained again. "
    "Or start over with overwrite=true"
)
"""Remedy for lost or damaged book-keeping; the checkpoints hold everything that was trained."""


class RunDirectory:
    """Opens the directory of a run for starting or continuing it.

    Only rank zero changes anything on the disk; the other ranks read the same files and come to the same decisions.

    Raises:
        ValueError: another process runs in the directory, it holds a finished run or one of another configuration, it holds
            files that are no run, or its state is unreadable.
        OSError: the directory cannot be written.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.root = Path(config.out or Path("runs") / config.name).absolute()
        self._lock: IO[str] | None = None
        run_id = hashlib.sha256(to_yaml_without(config, MAY_CHANGE).encode()).hexdigest()[:12]
        if process_rank() == 0:
            self._claim()
        state = self._read_state(may_be_damaged=config.overwrite)
        if config.overwrite and state is not None and (state.finished or state.run_id != run_id):
            state = None
        if config.overwrite and state is None and process_rank() == 0:
            self._clear()
        if state is None:
            state = RunState(run_id)
            if process_rank() == 0:
                write_atomic(self.root / "config.yaml", to_yaml(config))
                write_atomic(self.root / "state.json", json.dumps(asdict(state), indent=2))
        elif state.run_id != run_id:
            raise ValueError(self._changed(config))
        elif state.finished:
            raise ValueError(
                f"{self.root}: the run is finished (see report.html there); add overwrite=true to start it over, or "
                "name another directory with out=DIR"
            )
        self.state = state

    def stage_folder(self, stage: Stage) -> Path:
        """Where the stage's checkpoints lie."""
        return self.root / stage.folder

    def final(self, stage: Stage) -> Path | None:
        """The checkpoint of the stage's finished training, if there is one."""
        path = self.stage_folder(stage) / "final.ckpt"
        return path if path.is_file() else None

    def last(self, stage: Stage) -> Path | None:
        """The checkpoint from the middle of the stage's training, if there is one."""
        path = self.stage_folder(stage) / "last.ckpt"
        return path if path.is_file() else None

    def drop_incomplete(self, stages: list[Stage]) -> None:
        """Forget finished stages from the first on whose checkpoint is gone; they, and what was built on them, are done again."""
        for stage in stages[: self.state.stage]:
            if self.final(stage) is None:
                later = [s for s in stages[stage.index :] if not s.reset]
                logger.warning(
                    "%s has no final.ckpt: its stage and %d after it are done again", stage.folder, len(later) - 1
                )
                del self.state.steps[stage.index :]
                if process_rank() == 0:
                    for other in later:
                        for name in ("final.ckpt", "last.ckpt"):
                            (self.stage_folder(other) / name).unlink(missing_ok=True)
                    self.save()
                return

    @rank_zero_only
    def save(self) -> None:
        """Write `state.json`."""
        write_atomic(self.root / "state.json", json.dumps(asdict(self.state), indent=2))

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _claim(self) -> None:
        """Make the directory and lock it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / ".lock").open("w")
        except OSError as error:
            message = f"cannot write the run directory ({error.strerror}); choose another with out=DIR"
            raise OSError(error.errno, message, str(self.root)) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self.root}: another process is running this experiment; wait for it or use out=DIR"
            ) from error
        foreign = [p.name for p in self.root.iterdir() if not _is_ours(p.name)]
        if foreign and not (self.root / "state.json").is_file():
            raise ValueError(
                f"{self.root}: is not empty and holds no run ({foreign[0]}, ...); choose another with out=DIR"
            )

    def _clear(self) -> None:
        """Delete what a run has written, and nothing else."""
        for path in self.root.iterdir():
            if _is_ours(path.name) and path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _read_state(self, *, may_be_damaged: bool) -> RunState | None:
        path = self.root / "state.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            return RunState(**values)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            if may_be_damaged:
                return None
            raise ValueError(f"{path}: is damaged ({error}). {EVALUATE_AGAIN}") from error

    def _changed(self, config: ExperimentConfig) -> str:
        """Message that names what differs from the configuration that the directory was started with."""
        try:
            old = flatten(yaml.safe_load((self.root / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, yaml.YAMLError):
            old = {}
        new = flatten(yaml.safe_load(to_yaml(config)))
        changed = [
            f"{key}: {old.get(key)!r} -> {new.get(key)!r}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not _may_change(key, MAY_CHANGE)
        ]
        return (
            f"{self.root}: holds a run of another configuration. Changed: {'; '.join(changed) or 'config.yaml is unreadable'}. "
            "Undo the change to continue it, use out=DIR for a new run, or overwrite=true to start over"
        )


def to_yaml_without(config: ExperimentConfig, keys: tuple[str, ...]) -> str:
    """The flattened configuration as sorted text, without the keys that may change."""
    flat = flatten(asdict(config))
    return "\n".join(f"{key}={flat[key]!r}" for key in sorted(flat) if not _may_change(key, keys))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, without executing anything in it.

    Raises:
        ValueError: the file is damaged or not a checkpoint; the message names it and the remedy.
    """
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ... for damaged files
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{path}: cannot be read as a checkpoint ({first}); delete the file, the stage is then done again"
        ) from error
    if not isinstance(checkpoint, dict) or "mcit" not in checkpoint:
        raise ValueError(
            f"{path}: is not a checkpoint of mcit_lightning; delete the file, the stage is then done again"
        )
    return checkpoint


def _is_ours(name: str) -> bool:
    return name in OWN_FILES or name in (".lock", ZERO_SHOT) or name.startswith("stage_") or name.endswith(".tmp")


def _may_change(key: str, keys: tuple[str, ...]) -> bool:
    return any(key == allowed or key.startswith(f"{allowed}.") for allowed in keys)


def disk_error(error: OSError) -> str:
    """One line for a file-system error, with the remedy."""
    place = f"{error.filename}: " if error.filename else ""
    text = f"{place}{error.strerror or error}."
    if "out=DIR" in text:  # names its remedy already
        return text
    return f"{text} Free space or fix the permissions and run the same command again: the run continues."


def process_rank() -> int:
    """This process's rank, from the environment that the launcher set; 0 in the process that the user started."""
    return int(os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or os.environ.get("LOCAL_RANK") or 0)
