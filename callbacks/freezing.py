"""End of a task: the branches that it used most freeze for ever (BranchLoRA's tuning-freezing)."""

import logging
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.base import TaskCallback
from mcit_lightning.module import MCITModule
from mcit_lightning.plans import FreezeRecord
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.branchlora import BranchLoRA

logger = logging.getLogger(__name__)


class BranchFreeze(TaskCallback):
    """Counts how often each branch is chosen, over all ranks and once per batch, and freezes the most used after the task.

    The counts are part of the checkpoint, so a resumed stage freezes what an uninterrupted one would have. What froze is a
    `FreezeRecord` in the module's structure log. Warns when a module has no branch left to train and gets
    none.

    Raises:
        ValueError: the strategy has no branches that it could freeze.
    """

    def __init__(self) -> None:
        self._usage: Tensor | None = None

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Start counting anew."""
        if not isinstance(module.strategy, BranchLoRA):
            raise ValueError(
                f"callbacks.BranchFreeze: strategy {module.config.strategy['name']!r} has no branches to freeze; "
                "take the callback out of the list, or use branchlora"
            )
        self._usage = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch's counts, summed over ranks."""
        assert isinstance(pl_module, MCITModule) and isinstance(pl_module.strategy, BranchLoRA)
        if pl_module.strategy.config.freeze_branches:
            own = pl_module.strategy.usage(pl_module.towers.adapters)
            usage = trainer.strategy.reduce(own, reduce_op="sum")
            self._usage = usage if self._usage is None else self._usage.to(usage.device) + usage

    def on_task_end(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Freeze the most used branches of every module."""
        strategy = module.strategy
        assert isinstance(strategy, BranchLoRA)
        if strategy.config.freeze_branches and self._usage is not None:
            count, mass = self._usage.cpu().unbind(1)
            module.freeze_branches(FreezeRecord(stage.name, strategy.most_used(module.towers.adapters, count, mass)))
            exhausted = strategy.exhausted(module.towers)
            if exhausted and not strategy.config.grow_exhausted and trainer.is_global_zero:
                logger.warning(
                    "after stage %s all branches of %d of %d modules are frozen: later tasks train no branch there. Raise "
                    "strategy.experts, lower strategy.freeze_count, or set strategy.grow_exhausted",
                    stage.name,
                    len(exhausted),
                    len(module.towers.adapters),
                )

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {} if self._usage is None else {"usage": self._usage.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the checkpoint's counts."""
        usage = state_dict.get("usage")
        assert usage is None or isinstance(usage, torch.Tensor)
        self._usage = usage
