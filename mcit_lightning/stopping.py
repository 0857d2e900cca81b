"""The Trainer's side of `mcit_lightning.signals`."""

from typing import Any

import lightning as L
import torch

from mcit_lightning.signals import STOP


class StopAtSignal(L.Callback):
    """Makes training and evaluation stop between two batches after a signal.

    In training all processes learn of the signal at the start of the same batch (`agreed`); the checkpoint callback then saves
    after it. An evaluation stops at once, since it is repeated as a whole. Replaces Lightning's handler, which starts a
    collective inside of the signal handler, where it can meet another one.
    """

    def __init__(self) -> None:
        self.agreed = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals are noted."""
        self._defer(trainer)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """From here on signals are noted."""
        self._defer(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Tell each other; Lightning has just waited for the device in several processes."""
        if trainer.world_size == 1:
            self.agreed = STOP.signum is not None
            return
        own = torch.tensor(STOP.signum or 0, device=trainer.strategy.root_device)
        signum = int(trainer.strategy.reduce(own, reduce_op="max"))
        if signum:
            STOP.signum = STOP.signum or signum
            self.agreed = True

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Stop."""
        STOP.check()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Nothing is left to be saved."""
        STOP.deferring = False

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Everything is saved."""
        STOP.deferring = False

    def _defer(self, trainer: L.Trainer) -> None:
        STOP.deferring = True
        STOP.forward = getattr(trainer.strategy.launcher, "kill", None)
        STOP.listen()


def stop_agreed(trainer: L.Trainer) -> bool:
    """Whether all processes know that this training is to stop."""
    return any(callback.agreed for callback in trainer.callbacks if isinstance(callback, StopAtSignal))  # type: ignore[attr-defined]
