"""A LoRA per task, all of them summed: what several methods start from. Not a strategy of its own."""

from collections.abc import Iterator

from torch import nn

from mcit_lightning.plans import TaskPlan
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.sequential import Sequential
from mcit_lightning.towers import Towers, find_targets


class TaskLoRA(Sequential):
    """Every stage adds a branch of its own name to every target and trains that one; the earlier ones stay as they are.

    y = W0 x + (alpha / r) sum_{i <= t} B_i A_i x
    """

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """A branch for the stage in every target."""
        return TaskPlan(stage.name, ranks=dict.fromkeys(find_targets(towers, self.config.targets), self.config.rank))

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Attach the planned branches."""
        for path, rank in plan.ranks.items():
            layer = towers.attach(path, scale=self.config.alpha / rank, dropout=self.config.dropout)
            layer.add_branch(plan.stage, rank, seed=self.seed, path=path)

    def trainable(self, towers: Towers, stage: Stage) -> Iterator[nn.Parameter]:
        """The stage's branches."""
        for layer in towers.adapters.values():
            yield from (layer.lora_a[stage.name], layer.lora_b[stage.name])
