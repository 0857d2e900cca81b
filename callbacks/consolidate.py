"""End of a task: the strategy looks back if it wants to, consolidates, and what it freezes is recorded."""

from typing import Any

import lightning as L
import torch

from callbacks.base import TaskCallback
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import Stage


class Consolidate(TaskCallback):
    """Shows the strategy samples of the task again (`review`), calls its `end_task`, and carries out the freeze record.

    The samples are a fixed random part of the task's training data, one at a time, sharded over ranks. They are shown again if
    the run is killed before the stage's final checkpoint.
    """

    def on_task_end(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Consolidate on every rank; the strategy's decision is deterministic."""
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        samples = module.strategy.review_samples(stream.train_rows)
        if samples:
            module.model.eval()
            with torch.enable_grad():
                for batch in stream.probe_loader(samples, batch_size=1):
                    batch = trainer.strategy.batch_to_device(batch)
                    with trainer.precision_plugin.forward_context():
                        module.strategy.review(module.towers, batch, stage)
        record = module.strategy.end_task(module.towers, stage)
        if record is not None:
            module.freeze_branches(record)
