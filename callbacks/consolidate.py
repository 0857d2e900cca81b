"""End of a task: the strategy consolidates, and what it freezes is recorded."""

import lightning as L

from callbacks.base import TaskCallback
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import Stage


class Consolidate(TaskCallback):
    """Calls the strategy's `end_task` and carries out the freeze record that it returns."""

    def on_task_end(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Consolidate on every rank; the strategy's decision is deterministic."""
        record = module.strategy.end_task(module.towers, stage)
        if record is not None:
            module.freeze_branches(record)
