"""The reference runs around a continual method: joint and individual training, and no training at all."""

from mcit_lightning.plans import TaskPlan
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES, ContinualStrategy
from mcit_lightning.strategies.sequential import LoRAConfig, Sequential
from mcit_lightning.towers import Towers


@STRATEGIES.register("joint")
class Joint(Sequential):
    """One LoRA trained on all tasks at once: the upper bound of a continual method with that capacity."""

    @classmethod
    def stages(cls, tasks: list[str]) -> list[Stage]:
        """A single stage over all tasks, which fills the matrix's last row."""
        return [Stage(index=0, name="joint", train=tuple(tasks), row=len(tasks) - 1, evaluate="all")]


@STRATEGIES.register("individual")
class Individual(Sequential):
    """A LoRA of its own for each task, each from the pretrained model: what each task reaches undisturbed."""

    @classmethod
    def stages(cls, tasks: list[str]) -> list[Stage]:
        """A stage per task, each started over and evaluated on its own task only: the matrix's diagonal."""
        return [
            Stage(index=i, name=task, train=(task,), row=i, evaluate=(task,), reset=True)
            for i, task in enumerate(tasks)
        ]


@STRATEGIES.register("zero_shot")
class ZeroShot(ContinualStrategy):
    """The pretrained model, untouched: no stage, only the zero-shot row.

    It takes the hyper-parameters of a LoRA run without using them, so that `strategy.name=zero_shot` turns a run into this
    reference.
    """

    Config = LoRAConfig

    @classmethod
    def stages(cls, tasks: list[str]) -> list[Stage]:
        """None."""
        return []

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """Nothing is added."""
        return TaskPlan(stage.name)

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Nothing to build."""
