"""Showing a strategy some of a task's training samples outside of its training."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch

from callbacks.probe import batches, to_device
from mcit_lightning.loss import Batch
from mcit_lightning.module import MCITModule
from mcit_lightning.probe import evaluate_with_checkpointing


def show_samples(
    trainer: L.Trainer,
    module: MCITModule,
    samples: int,
    see: Callable[[Batch], None],
    batch_size: int | None = None,
) -> None:
    """Give a fixed random part of the stage's training samples to a function, sharded over ranks.

    The model computes as in evaluation, and recomputes activations where that is configured.

    Args:
        samples: how many, over all ranks.
        see: called with every batch, on the device and under the Trainer's precision.
        batch_size: samples per batch; None for the stage's.
    """
    stream: Any = trainer.datamodule  # type: ignore[attr-defined]
    to_device(trainer, module)
    evaluate_with_checkpointing(module.model)
    with torch.enable_grad():
        for batch in batches(trainer, stream.probe_loader(samples, batch_size)):
            with trainer.precision_plugin.forward_context():
                see(batch)
    module.model.eval()
