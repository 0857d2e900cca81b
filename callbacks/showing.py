"""Showing a strategy some of a task's training samples outside of its training."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from mcit_lightning.loss import Batch
from mcit_lightning.module import MCITModule


def show_samples(
    trainer: L.Trainer,
    module: MCITModule,
    samples: int,
    see: Callable[[Batch], None],
    batch_size: int | None = None,
) -> None:
    """Give a fixed random part of the stage's training samples to a function, sharded over ranks.

    The model computes as in evaluation. With activation checkpointing it has to be in training mode, because transformers skips
    recomputation otherwise; the adapters' dropout is off all the same.

    Args:
        samples: how many, over all ranks.
        see: called with every batch, on the device and under the Trainer's precision.
        batch_size: samples per batch; None for the stage's.
    """
    stream: Any = trainer.datamodule  # type: ignore[attr-defined]
    module.to(trainer.strategy.root_device)
    module.model.train(module.config.backbone.activation_checkpointing)
    for layer in module.towers.adapters.values():
        layer.dropout.eval()
    with torch.enable_grad():
        for batch in stream.probe_loader(samples, batch_size):
            with trainer.precision_plugin.forward_context():
                see(trainer.strategy.batch_to_device(batch))
    module.model.eval()
