"""A LightningModule that only writes down its batches, for tests of the data stream under a real Trainer."""

from pathlib import Path
from typing import Any

import lightning as L
import torch


class Recorder(L.LightningModule):
    """Writes down what it is given and moves one weight, so that a checkpoint is a checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[tuple[int, list[str]]] = []
        self.tested: list[tuple[int, str]] = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> torch.Tensor:
        self.seen.append((self.current_epoch, batch["id"]))
        return self.weight * batch["targets"].sum()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        assert batch["targets"].numel() > 0

    def test_step(self, batch: dict[str, Any], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.tested += [(dataloader_idx, name) for name in batch["id"]]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([self.weight], lr=1e-6)


class SaveAt(L.Callback):
    """Save in the middle of training, as a kill would find it."""

    def __init__(self, path: Path, step: int) -> None:
        self.path = path
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def trainer(tmp_path: Path, *callbacks: L.Callback, **options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(
        **{
            "accelerator": "cpu",
            "devices": 1,
            "max_epochs": 3,
            "default_root_dir": tmp_path,
            "num_sanity_val_steps": 0,
            "use_distributed_sampler": False,
            "callbacks": list(callbacks),
            **quiet,
            **options,
        }
    )
