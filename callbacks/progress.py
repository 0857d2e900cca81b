"""Progress bars that say which stage and task they belong to."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import TQDMProgressBar

from callbacks.base import evaluated_stage


class StageProgress(TQDMProgressBar):
    """Lightning's bar with the stage's number, name and epoch, and in evaluation the task's name."""

    def on_train_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Name the stage and the epoch."""
        super().on_train_epoch_start(trainer, *_)
        epoch = f" epoch {trainer.current_epoch + 1}/{trainer.max_epochs}" if (trainer.max_epochs or 1) > 1 else ""
        self.train_progress_bar.set_description(f"{_label(trainer)} train{epoch}")

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Name the task that is evaluated."""
        super().on_test_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)
        task = trainer.datamodule.test_tasks[dataloader_idx]  # type: ignore[attr-defined]
        self.test_progress_bar.set_description(f"{_label(trainer)} evaluate {task}")


def _label(trainer: L.Trainer) -> str:
    stage = evaluated_stage(trainer)
    if stage is None:
        return "zero-shot"
    return f"stage {stage.index + 1}/{len(trainer.datamodule.stages)} {stage.name}"  # type: ignore[attr-defined]
