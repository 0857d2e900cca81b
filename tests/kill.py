"""A callback that ends the process's work at a chosen point, as a kill would, or sends it a signal there."""

import os
from pathlib import Path
from typing import Any

import lightning as L

POINT: tuple[Any, ...] | None = None
"""Where to stop next: ("batch", stage, index), ("epoch", stage, index), ("end", stage), ("test", stage, batch)
or ("setup", stage); None for nowhere."""
SIGNUM: int | None = None
"""Signal to send there; None to stop as SIGKILL does."""


class Killed(BaseException):
    """Not an Exception, so that nothing handles it on the way out."""


class KillAt(L.Callback):
    """Acts when training or evaluation comes to `POINT`, once."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        if stage == "fit":
            self._kill("setup", pl_module.stage.index)

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._kill("batch", pl_module.stage.index, trainer.fit_loop.epoch_loop.total_batch_idx)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._kill("epoch", pl_module.stage.index, trainer.current_epoch)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._kill("end", pl_module.stage.index)

    def on_test_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        zero_shot = Path(trainer.default_root_dir).name == "zero_shot"
        self._kill("test", -1 if zero_shot else pl_module.stage.index, dataloader_idx)

    def _kill(self, *here: Any) -> None:
        global POINT
        if here == POINT:
            POINT = None
            if SIGNUM is None:
                raise Killed(str(here))
            os.kill(os.getpid(), SIGNUM)
