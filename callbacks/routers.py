"""Start of a task: new branches and routers."""

import logging

import lightning as L

from callbacks.base import TaskCallback
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import Stage

logger = logging.getLogger(__name__)


class RouterSpawn(TaskCallback):
    """Spawns what the strategy plans for a task: its branches in the first stage, a router per module in every stage.

    Routers of earlier tasks stay in the model, frozen. A task whose plan was carried out before an interruption is left as it is.
    """

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Plan and grow."""
        module.grow(module.strategy.plan(stage, module.towers))
        routers = {len(layer.routers) for layer in module.towers.adapters.values()}
        if trainer.is_global_zero and routers:
            logger.info("stage %s: %d router(s) per module", stage.name, max(routers))
