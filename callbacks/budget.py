"""Start of a task: the budget is allocated anew, and the experts grow where it went."""

from dataclasses import asdict

import lightning as L

from callbacks.base import TaskCallback
from mcit_lightning.module import MCITModule
from mcit_lightning.plans import TaskPlan
from mcit_lightning.stages import Stage


class BudgetReallocation(TaskCallback):
    """Carries out the strategy's plan for the task, decided by rank zero, and enters it into the results.

    The plan is appended to the module's structure log, which every checkpoint holds. A task whose plan was carried out before
    an interruption keeps it.
    """

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Plan, grow, and report."""
        plan = module.structure.plan(stage.name)
        if plan is None:
            # the same on all ranks already; the broadcast makes sure that they never build different models
            decided = asdict(module.strategy.plan(stage, module.towers)) if trainer.is_global_zero else {}
            plan = TaskPlan(**trainer.strategy.broadcast(decided))
            module.grow(plan)
        module.results.allocation[stage.name] = {"ratios": plan.ratios, "ranks": plan.ranks, **plan.extra}
