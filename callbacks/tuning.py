"""End of a task: the router that is a LoRA learns to tell the tasks so far apart."""

import logging
import time
from typing import Any

import lightning as L

from callbacks.base import TaskCallback, require, save_results
from mcit_lightning.module import MCITModule
from mcit_lightning.probe import evaluate_with_checkpointing
from mcit_lightning.stages import Stage
from mcit_lightning.strategies import MRLoRA
from mcit_lightning.tuning import tune

logger = logging.getLogger(__name__)


class RouterTuning(TaskCallback):
    """Trains MR-LoRA's router on a few samples of all tasks so far, after every task but the first.

    The router starts anew each time, and every process takes part. It is trained again if the run is killed before the stage's
    final checkpoint. Listed after StageCost, its seconds are not among those of the stage's training.

    Raises:
        ValueError: the strategy has no such router, or its training diverges.
    """

    def on_task_end(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Train on every rank."""
        strategy, towers = require(self, module, MRLoRA), module.towers
        if len(strategy.tasks) < 2:
            return
        began = time.perf_counter()
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        question, config = strategy.expert_question(), strategy.config
        kept = [sample for task in strategy.tasks for sample in stream.kept_samples(task, config.router_samples)]
        recipe = strategy.recipe(stage)
        steps = recipe.steps(len(kept))
        loader = stream.tuning_loader([question.solved(sample) for sample in kept], steps)
        evaluate_with_checkpointing(module.model)
        try:
            first, last = tune(
                towers.model,
                strategy.new_router(towers),
                ((trainer.strategy.batch_to_device(batch), counts) for batch, counts in loader),
                recipe,
                len(steps),
                acting=lambda batch: strategy.as_router(towers, batch),
                context=trainer.precision_plugin.forward_context,
            )
        except ValueError as error:
            raise ValueError(
                f"the router of stage {stage.name!r} has diverged: {error}; lower strategy.router_lr"
            ) from error
        module.model.eval()
        cost = module.results.cost_row(stage.name, stage.folder, stage.row)
        cost.router_seconds = time.perf_counter() - began
        save_results(trainer, module)
        if trainer.is_global_zero:
            logger.info(
                "stage %s: router of %d samples in %d steps, %.1f s: loss %.4g in the first epoch, %.4g in the last",
                *(stage.name, len(kept), len(steps), cost.router_seconds, first, last),
            )
