"""Start of a task: how the budget is split between the vision tower and the language model."""

import logging

import lightning as L

from callbacks.base import TaskCallback, require
from mcit_lightning.allocation import shares
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import Stage
from mcit_lightning.strategies import DMoLE

logger = logging.getLogger(__name__)


class CurriculumRatio(TaskCallback):
    """Updates the inter-modal ratio: each tower's share of the budget is its share of the difficulty (D-MoLE, Eq. 13-15).

    Logs `curriculum/<tower>` at the stage's first step. List it after `GradientProbe` and before `BudgetReallocation`.

    Raises:
        ValueError: the strategy has no budget to split, or nothing was probed before.
    """

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Decide the ratio of the stage."""
        strategy = require(self, module, DMoLE)
        strategy.ratios = None
        if module.is_restored(stage) or not strategy.config.curriculum or strategy.config.allocation == "uniform":
            return
        if strategy.scores is None:
            raise ValueError("callbacks.CurriculumRatio: nothing was probed; list callbacks.GradientProbe before it")
        strategy.ratios = shares(strategy.difficulties(module.towers))
        for logger_ in trainer.loggers:
            logger_.log_metrics({f"curriculum/{tower}": share for tower, share in strategy.ratios.items()}, step=0)
        if trainer.is_global_zero:
            text = ", ".join(f"{tower} {100 * share:.1f} %" for tower, share in strategy.ratios.items())
            logger.info("stage %s: share of the budget by difficulty: %s", stage.name, text)
