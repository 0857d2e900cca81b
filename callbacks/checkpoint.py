"""Checkpoints of a stage: `last.ckpt` to resume from, `final.ckpt` when its training is done."""

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint


class StageCheckpoint(Checkpoint):
    """Saves so that a killed run continues exactly where an uninterrupted one would have been.

    `last.ckpt` (optimizer, loader position and all) is written every n optimizer steps and at epoch ends, but not after the last
    batch of the last epoch: resuming from there would make `fit` return without the end-of-task hooks. `final.ckpt` (adapters and
    structure) is written in `on_train_end`, which Lightning calls for checkpoint callbacks after all others, so it holds what the
    end of the task decided; `last.ckpt` is removed then. Files are written under another name, flushed and renamed.

    Args:
        every_n_steps: optimizer steps between two saves; an interruption repeats at most so many.

    Raises:
        ValueError: `every_n_steps` is less than 1.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"callbacks.StageCheckpoint: every_n_steps is {every_n_steps}, must be at least 1")
        self.every_n_steps = every_n_steps
        self._saved_at = -1

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch, only between accumulation windows: partial gradients are not part of a checkpoint."""
        window_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved_at
        if window_complete and due and batch_idx + 1 < trainer.num_training_batches:
            self._save_last(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save between epochs."""
        if trainer.max_epochs is not None and trainer.current_epoch + 1 < trainer.max_epochs:
            self._save_last(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the stage has learnt."""
        folder = Path(trainer.default_root_dir)
        _save(trainer, folder / "final.ckpt", weights_only=True)
        if trainer.is_global_zero:
            (folder / "last.ckpt").unlink(missing_ok=True)

    def _save_last(self, trainer: L.Trainer) -> None:
        self._saved_at = trainer.global_step
        _save(trainer, Path(trainer.default_root_dir) / "last.ckpt", weights_only=False)


def _save(trainer: L.Trainer, path: Path, *, weights_only: bool) -> None:
    """Write a checkpoint atomically; collective, so every rank calls it."""
    temporary = path.with_suffix(".tmp")
    try:
        trainer.save_checkpoint(temporary, weights_only=weights_only)
        if trainer.is_global_zero:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            for logger in trainer.loggers:
                logger.save()  # a kill after this point must not lose curve points from before it
    except BaseException:
        if trainer.is_global_zero:
            temporary.unlink(missing_ok=True)
        raise
    trainer.strategy.barrier()
