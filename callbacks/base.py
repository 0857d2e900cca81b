"""Task boundaries as Lightning hooks."""

from pathlib import Path
from typing import TypeVar

import lightning as L
from torch import Tensor

from mcit_lightning.module import MCITModule
from mcit_lightning.stages import ZERO_SHOT, Stage
from mcit_lightning.strategies import ContinualStrategy

S = TypeVar("S", bound=ContinualStrategy)


def evaluated_stage(trainer: L.Trainer) -> Stage | None:
    """The stage after which an evaluation is; None before any training."""
    if Path(trainer.default_root_dir).name == ZERO_SHOT:
        return None
    stage: Stage = trainer.datamodule.stage  # type: ignore[attr-defined]
    return stage


def require(callback: L.Callback, module: MCITModule, kind: type[S]) -> S:
    """The module's strategy, which must be of a kind.

    Raises:
        ValueError: it is not; names the callback to take out of the list.
    """
    if not isinstance(module.strategy, kind):
        raise ValueError(
            f"callbacks.{type(callback).__name__}: strategy {module.config.strategy['name']!r} has no use for it; take the "
            f"callback out of the list, or use {kind.__name__.lower()}"
        )
    return module.strategy


def save_results(trainer: L.Trainer, module: MCITModule) -> None:
    """Write what is known so far, on rank zero. What was measured before or in a training is known only to this process, and a
    killed run does not measure it again."""
    if trainer.is_global_zero:
        module.results.save(Path(trainer.default_root_dir).parent)


def share_state(trainer: L.Trainer, module: MCITModule) -> None:
    """Give rank zero's state of the strategy (routers, keys, subspaces) to all ranks. Collective."""
    own = module.strategy.state_dict()
    state = {name: value.cpu() for name, value in own.items() if isinstance(value, Tensor)}
    module.strategy.load_state_dict(trainer.strategy.broadcast(state))


class TaskCallback(L.Callback):
    """A callback with task boundaries: `on_task_start` before a stage's training, `on_task_end` after it.

    The start is `setup("fit")`: the process group exists, DDP has not wrapped the model and no optimizer was made, so this is
    the one place where modules may grow or freeze. (Later, ranks would diverge without an error.) The model is still on the CPU
    there. The end is `on_train_end`, where device and collectives are available; it runs before the stage's final checkpoint is
    written, so what is decided there is saved. After a kill, a stage that was trained is not started again, and one that was not
    starts again with the structure that its checkpoint holds: `on_task_start` must accept that its work is done.
    """

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Called on every rank before the stage's training."""

    def on_task_end(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Called on every rank after the stage's training."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start of a task; does nothing for validation and test."""
        if stage == "fit":
            assert isinstance(pl_module, MCITModule)
            self.on_task_start(trainer, pl_module, pl_module.stage)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End of a task."""
        assert isinstance(pl_module, MCITModule)
        self.on_task_end(trainer, pl_module, pl_module.stage)
