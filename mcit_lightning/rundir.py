"""The run directory: which run it holds, how far that run is, and what a restart may change."""

import hashlib
import logging
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.utilities import rank_zero_only

from mcit_lightning.checkpoints import DamagedCheckpointError, check_seal
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.files import checked_json, read_checked_json, write_atomic
from mcit_lightning.loading import flatten, to_yaml
from mcit_lightning.locks import DirectoryLock
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
    "loggers",
)
MAY_CHANGE = (
    "out",
    "overwrite",
    "dry_run",
    "loggers",
    "data.num_workers",
    "data.source",
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

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "RunState":
        """The content of `state.json`.

        Raises:
            ValueError: a value is of the wrong type; names it.
            TypeError: a key is missing or unknown.
        """
        state = cls(**values)
        steps = state.steps
        if not (isinstance(steps, list) and all(type(count) is int and count >= 0 for count in steps)):
            raise ValueError(f"steps is {steps!r}, must be a list of numbers")
        for name, kind in (("run_id", str), ("zero_shot", bool), ("finished", bool)):
            if type(getattr(state, name)) is not kind:
                raise ValueError(f"{name} is {getattr(state, name)!r}")
        return state


CHECKPOINTS = ("final.ckpt", "last.ckpt", "previous.ckpt")
"""Of a stage, the newest first."""
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
        self._lock = DirectoryLock(self.root)
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
                write_atomic(self.root / "state.json", checked_json(asdict(state)))
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
        return self._there(stage, "final.ckpt")

    def last(self, stage: Stage) -> Path | None:
        """The newest checkpoint from the middle of the stage's training, if there is one."""
        return self._there(stage, "last.ckpt") or self._there(stage, "previous.ckpt")

    def prepare_to_continue(self, stages: list[Stage]) -> None:
        """Find the newest whole checkpoint, and set back `state` to where the run goes on from it.

        A damaged checkpoint is renamed, so that the one before it is used: `previous.ckpt` of the stage, or the stage before.
        Finished stages from the first on whose final checkpoint is gone, and what was built on them, are done again.
        """
        self._set_aside_damaged(stages)
        for stage in stages[: self.state.stage]:
            if self.final(stage) is None:
                later = [s for s in stages[stage.index :] if not s.reset]
                logger.warning(
                    "%s has no final.ckpt: its stage and %d after it are done again", stage.folder, len(later) - 1
                )
                del self.state.steps[stage.index :]
                if process_rank() == 0:
                    for other in later:
                        for name in CHECKPOINTS:
                            (self.stage_folder(other) / name).unlink(missing_ok=True)
                    self.save()
                return

    def _there(self, stage: Stage, name: str) -> Path | None:
        path = self.stage_folder(stage) / name
        return path if path.is_file() else None

    def _set_aside_damaged(self, stages: list[Stage]) -> None:
        """Rename damaged checkpoints from the newest back to the first whole one, from which the run goes on."""
        for stage in reversed(stages[: self.state.stage + 1]):
            for name in CHECKPOINTS if stage.index == self.state.stage else ("final.ckpt",):
                path = self.stage_folder(stage) / name
                try:
                    check_seal(path)
                    return
                except FileNotFoundError:  # also if rank zero has just renamed it
                    continue
                except DamagedCheckpointError as error:
                    kept = path.with_name(f"{name}.damaged")
                    logger.warning(
                        "%s. It is kept as %s; the run goes back to the checkpoint before it", error, kept.name
                    )
                    if process_rank() == 0:
                        path.replace(kept)
            if stage.reset:
                return

    @rank_zero_only
    def save(self) -> None:
        """Write `state.json`."""
        write_atomic(self.root / "state.json", checked_json(asdict(self.state)))

    def close(self) -> None:
        """Let go of the directory."""
        self._lock.release()

    def _claim(self) -> None:
        """Make the directory and lock it."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            foreign = [p.name for p in self.root.iterdir() if not _is_ours(p.name)]
            if foreign and not (self.root / "state.json").is_file():
                raise ValueError(
                    f"{self.root}: is not empty and holds no run ({foreign[0]}, ...); choose another with out=DIR"
                )
            self._lock.acquire()
        except OSError as error:
            message = f"cannot write the run directory ({error.strerror}); choose another with out=DIR"
            raise OSError(error.errno, message, str(self.root)) from error
        self._clear_leftovers()

    def _clear_leftovers(self) -> None:
        """Delete half-written files of a killed process, and set aside checkpoints of Lightning's own SLURM requeue.

        Lightning would load the latter, in every fit and test, in place of what the run gives it.
        """
        left = [*self.root.glob("**/.*.tmp")]
        if not (
            self.root / "state.json"
        ).is_file():  # of a run that continues, they are what its evaluation has finished
            left += self.root.glob("predictions/**/.*.part")
        for path in left:
            path.unlink(missing_ok=True)
        for path in self.root.glob("*/hpc_ckpt_*"):
            kept = path.with_name(f"unused_{path.name.replace('hpc_ckpt_', 'requeue_')}")
            logger.warning(
                "%s: the run does not use Lightning's requeue checkpoints; it is kept as %s", path, kept.name
            )
            path.replace(kept)

    def _clear(self) -> None:
        """Delete what a run has written, and nothing else."""
        own = [path for path in self.root.iterdir() if _is_ours(path.name) and path.name != ".lock"]
        for path in sorted(
            own, key=lambda path: path.name == "state.json"
        ):  # it goes last: a kill must not leave half a run
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _read_state(self, *, may_be_damaged: bool) -> RunState | None:
        path = self.root / "state.json"
        if not os.path.lexists(path):
            return None
        try:
            if not path.is_file():  # reading a pipe would wait for ever
                raise ValueError("is not a file")
            return RunState.from_dict(read_checked_json(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            if may_be_damaged:
                return None
            raise ValueError(f"{path}: is damaged ({error}). {EVALUATE_AGAIN}") from error

    def _changed(self, config: ExperimentConfig) -> str:
        """Message that names what differs from the configuration that the directory was started with."""
        try:
            old = flatten(yaml.safe_load((self.root / "config.yaml").read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError, yaml.YAMLError):
            old = {}
        new = flatten(yaml.safe_load(to_yaml(config))) if old else {}
        changed = [
            f"{key}: {old.get(key)!r:.80} -> {new.get(key)!r:.80}"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not _may_change(key, MAY_CHANGE)
        ]
        return (
            f"{self.root}: holds a run of another configuration. Changed: {'; '.join(changed[:9]) or 'config.yaml is unreadable'}"
            f"{f' and {len(changed) - 9} more' if len(changed) > 9 else ''}. "
            "Undo the change to continue it, use out=DIR for a new run, or overwrite=true to start over"
        )


def to_yaml_without(config: ExperimentConfig, keys: tuple[str, ...]) -> str:
    """The flattened configuration as sorted text, without the keys that may change."""
    flat = flatten(asdict(config))
    return "\n".join(f"{key}={flat[key]!r}" for key in sorted(flat) if not _may_change(key, keys))


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
