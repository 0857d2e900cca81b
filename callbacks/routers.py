"""Start of a task: new branches and routers."""

import logging
import time
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.base import TaskCallback, save_results, share_state
from callbacks.probe import batches, to_device
from mcit_lightning.module import MCITModule
from mcit_lightning.sharding import lockstep
from mcit_lightning.stages import Stage

logger = logging.getLogger(__name__)


class RouterSpawn(TaskCallback):
    """Spawns what the strategy plans for a task, and makes the task's router where that takes a look at its samples.

    For BranchLoRA that is a router per module and task; for D-MoLE the task's autoencoder, trained on features of the pretrained
    model, which are computed on all ranks. Routers of earlier tasks stay in the model, frozen. A task that was started before
    an interruption is left as it is.
    """

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Plan and grow unless another callback has, then fit."""
        if module.structure.plan(stage.name) is None:
            module.grow(module.strategy.plan(stage, module.towers))
        routers = max((len(layer.routers) for layer in module.towers.adapters.values()), default=0)
        if trainer.is_global_zero and routers:
            logger.info("stage %s: %d router(s) per module", stage.name, routers)
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        samples = module.strategy.router_samples(stream.train_rows)
        if samples and not module.is_restored(stage):
            self._fit(trainer, module, stage, samples)

    def _fit(self, trainer: L.Trainer, module: MCITModule, stage: Stage, samples: int) -> None:
        began = time.perf_counter()
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        to_device(trainer, module)
        module.model.eval()
        if samples < trainer.world_size:
            raise ValueError(
                f"callbacks.RouterSpawn: the router of stage {stage.name!r} is made from {samples} samples, fewer than the "
                f"{trainer.world_size} processes; lower trainer.devices"
            )
        parts = []
        for batch, counts in lockstep(batches(trainer, stream.probe_loader(samples)), module.towers):
            with trainer.precision_plugin.forward_context():
                own = module.strategy.features(module.towers, batch)
            if counts:
                parts.append(own)
        features = _of_all_ranks(trainer, torch.cat(parts), samples)
        report = module.strategy.fit_router(stage, features)
        # every rank has fitted the same numbers; rank zero's result makes them the same to the last bit
        share_state(trainer, module)
        cost = module.results.cost_row(stage.name, stage.folder, stage.row)
        cost.router_seconds = time.perf_counter() - began
        save_results(trainer, module)
        if trainer.is_global_zero:
            text = ", ".join(f"{name} {value:.4g}" for name, value in report.items())
            logger.info("stage %s: router of %d samples in %.1f s: %s", stage.name, samples, cost.router_seconds, text)


def _of_all_ranks(trainer: L.Trainer, own: Tensor, samples: int) -> Tensor:
    """[samples, d] in the order of the sample, of which each rank has every `world_size`-th row."""
    world = trainer.world_size
    if world == 1:
        return own
    padded = own.new_zeros(-(-samples // world), own.shape[1])
    padded[: len(own)] = own
    gathered = trainer.strategy.all_gather(padded)  # [world, rows, d]
    return gathered.transpose(0, 1).flatten(0, 1)[:samples]
