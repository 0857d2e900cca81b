"""Checkpoints of a stage: `last.ckpt` to resume from, `final.ckpt` when its training is done."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from mcit_lightning.evaluation.files import flush_folder
from mcit_lightning.signals import STOP
from mcit_lightning.stopping import stop_agreed


class StageCheckpoint(Checkpoint):
    """Saves so that a killed run continues exactly where an uninterrupted one would have been.

    A checkpoint (optimizer, loader position and all) is written every n optimizer steps, at epoch ends and when a signal asks the
    run to stop, but not after the last batch of the last epoch: resuming from there would make `fit` return without the
    end-of-task hooks. It is written as `next.ckpt` and becomes `last.ckpt` before the next batch, when the loggers have the
    points of its own batch on the disk; the one before it stays as `previous.ckpt`. `final.ckpt` (adapters and structure) is
    written in `on_train_end`, which Lightning calls for checkpoint callbacks after all others, so it holds what the end of the
    task decided; the others are removed then.

    Nothing is saved, and the run ends, when the loss or a trained weight is no longer a finite number. That is looked at with
    every save and every `trainer.log_every_n_steps` steps; the step is counted on the device, without waiting for it.

    Args:
        every_n_steps: optimizer steps between two saves; an interruption repeats at most so many.
        nonfinite: `stop`, or `ignore` to train on and save all the same.

    Raises:
        ValueError: `every_n_steps` is less than 1, `nonfinite` is neither, or training has diverged.
    """

    def __init__(self, every_n_steps: int = 500, nonfinite: str = "stop") -> None:
        super().__init__()
        if every_n_steps < 1:
            raise ValueError(f"callbacks.StageCheckpoint: every_n_steps is {every_n_steps}, must be at least 1")
        if nonfinite not in ("stop", "ignore"):
            raise ValueError(f"callbacks.StageCheckpoint: nonfinite is {nonfinite!r}, must be stop or ignore")
        self.every_n_steps = every_n_steps
        self.nonfinite = nonfinite
        self._saved_at = -1
        self._pending = False
        self._bad_step: Tensor | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """What the batch before has saved is now complete; stop here if that is asked for.

        Raises:
            StoppedBySignal: a signal has come and its checkpoint is written.
        """
        if self._pending:
            self._promote(trainer)
            if stop_agreed(trainer):
                STOP.check()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save inside an epoch, only between accumulation windows: partial gradients are not part of a checkpoint."""
        self._note(outputs, trainer.global_step)
        window_complete = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._saved_at
        if window_complete and (due or stop_agreed(trainer)) and batch_idx + 1 < trainer.num_training_batches:
            self._save(trainer)
        elif window_complete and trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._refuse_nonfinite(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save between epochs."""
        if trainer.max_epochs is not None and trainer.current_epoch + 1 < trainer.max_epochs:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save what the stage has learnt."""
        self._refuse_nonfinite(trainer)
        folder = Path(trainer.default_root_dir)
        _flush_logs(trainer)
        trainer.save_checkpoint(folder / "final.ckpt", weights_only=True)
        if trainer.is_global_zero:
            for name in ("next.ckpt", "last.ckpt", "previous.ckpt"):
                (folder / name).unlink(missing_ok=True)
        trainer.strategy.barrier()

    def _save(self, trainer: L.Trainer) -> None:
        """Collective, so every rank calls it. `SealedCheckpointIO` writes the file whole or not at all."""
        self._refuse_nonfinite(trainer)
        self._saved_at = trainer.global_step
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "next.ckpt", weights_only=False)
        self._pending = True

    def _promote(self, trainer: L.Trainer) -> None:
        self._pending = False
        if trainer.is_global_zero:
            _flush_logs(trainer)
            folder = Path(trainer.default_root_dir)
            if (folder / "last.ckpt").exists():
                (folder / "last.ckpt").replace(folder / "previous.ckpt")
            (folder / "next.ckpt").replace(folder / "last.ckpt")
            flush_folder(folder)
        trainer.strategy.barrier()

    def _note(self, outputs: Any, step: int) -> None:
        """Keep the first step whose loss is not finite, without waiting for the device."""
        loss = outputs["loss"].detach()
        if self._bad_step is None:
            self._bad_step = torch.full((), -1, dtype=torch.long, device=loss.device)
        self._bad_step = torch.where((self._bad_step < 0) & ~loss.isfinite(), step, self._bad_step)

    def _refuse_nonfinite(self, trainer: L.Trainer) -> None:
        """Collective.

        Raises:
            ValueError: the loss has not been finite, or a trained weight is not.
        """
        if self.nonfinite == "ignore":
            return
        device = trainer.strategy.root_device
        step = torch.full((), -1, device=device) if self._bad_step is None else self._bad_step
        weights = [_local(p).isfinite().all() for p in trainer.lightning_module.parameters() if p.requires_grad]
        state = torch.stack([step, (~torch.stack([w.to(device) for w in weights]).all()).long()])
        bad_step, bad_weights = (int(value) for value in trainer.strategy.reduce(state, reduce_op="max"))
        if bad_step < 0 and not bad_weights:
            return
        what = (
            f"the loss is not a finite number, first in step {bad_step}" if bad_step >= 0 else "a weight is not finite"
        )
        stage = trainer.datamodule.stage  # type: ignore[attr-defined]
        raise ValueError(
            f"stage {stage.name!r} has diverged: {what} (seen in step {trainer.global_step}). Nothing was saved since; what was "
            "saved before is untouched. The same command would repeat it: lower optim.lr, raise optim.warmup_ratio, set "
            "trainer.gradient_clip_val=1.0 or trainer.precision=32-true, or look for broken rows with `mcit-lightning data "
            "verify`, and start that as a new run (out=DIR) or over (overwrite=true). StageCheckpoint's nonfinite: ignore "
            "trains on"
        )


def _local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter that is spread over ranks."""
    shard = getattr(parameter.detach(), "to_local", None)
    return parameter.detach() if shard is None else shard()


def _flush_logs(trainer: L.Trainer) -> None:
    for logger in trainer.loggers:
        logger.save()
