"""Start of a task: the gradient norms that decide where its experts go."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.base import TaskCallback, require, save_results
from mcit_lightning.module import MCITModule
from mcit_lightning.probe import evaluate_with_checkpointing, gradient_scores, parts
from mcit_lightning.stages import Stage
from mcit_lightning.strategies import DMoLE

logger = logging.getLogger(__name__)


class GradientProbe(TaskCallback):
    """Measures the zero-cost proxy of every candidate on a small sample of the task, on the pretrained model.

    The sample is fixed by the seed, sharded over the ranks, and the gradients are summed over them, so the scores depend neither
    on the number of ranks nor on the batches. The strategy keeps them for the plan. A task whose plan was carried out before an
    interruption is not probed again.

    Raises:
        ValueError: the strategy takes no scores.
    """

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Probe on every rank."""
        strategy = require(self, module, DMoLE)
        if module.is_restored(stage) or not strategy.needs_scores:
            return
        began = time.perf_counter()
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        paths = [path for paths in strategy.candidates(module.towers).values() for path in paths]
        config, samples = strategy.config, strategy.proxy_samples(stream.train_rows)
        to_device(trainer, module)
        evaluate_with_checkpointing(module.model)
        strategy.scores = {}
        for part in parts(module.towers, paths, config.proxy_passes):
            strategy.scores |= gradient_scores(
                module.towers,
                part,
                batches(trainer, stream.probe_loader(samples)),
                samples,
                bias=config.proxy_bias,
                by_batch=config.proxy_loss == "batch",
                offload=config.proxy_offload,
                dtype=torch.float32 if config.proxy_accumulate == "float32" else None,
                context=trainer.precision_plugin.forward_context,
                reduce=lambda total: _summed(trainer, total, only_zero=config.proxy_ranks == "rank_zero"),
            )
        module.model.eval()
        cost = module.results.cost_row(stage.name, stage.folder, stage.row)
        cost.proxy_seconds = time.perf_counter() - began
        save_results(trainer, module)
        if trainer.is_global_zero:
            logger.info(
                "stage %s: gradients of %d modules over %d samples in %.1f s",
                stage.name,
                len(paths),
                samples,
                cost.proxy_seconds,
            )


def to_device(trainer: L.Trainer, module: MCITModule) -> None:
    """Where, and how, Lightning will put the module a moment later; before a task starts, it is on the CPU."""
    module.configure_model()
    module.to(trainer.strategy.root_device)


def batches(trainer: L.Trainer, loader: Any) -> Iterator[Any]:
    """The batches of a loader, on the device."""
    for batch in loader:
        yield trainer.strategy.batch_to_device(batch)


def _summed(trainer: L.Trainer, total: Tensor, only_zero: bool) -> Tensor:
    if only_zero and not trainer.is_global_zero:
        total = torch.zeros_like(total)
    summed = trainer.strategy.reduce(total, reduce_op="sum")
    assert isinstance(summed, Tensor)
    return summed
