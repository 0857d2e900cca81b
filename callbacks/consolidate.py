"""End of a task: the strategy looks back if it wants to, consolidates, and what it freezes is recorded."""

import lightning as L

from callbacks.base import TaskCallback
from callbacks.showing import show_samples
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import Stage


class Consolidate(TaskCallback):
    """Shows the strategy samples of the task again (`review`), calls its `end_task`, and carries out the freeze record.

    The samples are shown again if the run is killed before the stage's final checkpoint.
    """

    def on_task_end(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Consolidate on every rank; the strategy's decision is deterministic."""
        strategy = module.strategy
        samples = strategy.review_samples(trainer.datamodule.train_rows)  # type: ignore[attr-defined]
        if samples:
            show_samples(
                trainer,
                module,
                samples,
                lambda batch: strategy.review(module.towers, batch, stage),
                strategy.review_batch_size,
            )
        record = strategy.end_task(module.towers, stage)
        if record is not None:
            module.freeze_branches(record)
