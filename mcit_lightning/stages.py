"""A stage is one `fit` and the evaluation after it; a strategy says which stages a task sequence has."""

from dataclasses import dataclass
from typing import Literal

ZERO_SHOT = "zero_shot"
"""Name of the folder of the evaluation before any training, where stages have theirs."""


@dataclass(frozen=True)
class Stage:
    """One training stage.

    Args:
        index: 0-based position in the run; directories count from 1 (`stage_01`).
        name: what people read: the task's name, or `joint`.
        train: tasks whose training data the stage streams.
        row: row of the accuracy matrix that the evaluation after the stage fills.
        evaluate: tasks evaluated after the stage; `seen` means all tasks up to `row`, `all` every task.
        reset: start from the pretrained model instead of the previous stage's result.
    """

    index: int
    name: str
    train: tuple[str, ...]
    row: int
    evaluate: tuple[str, ...] | Literal["seen", "all"] = "seen"
    reset: bool = False

    @property
    def folder(self) -> str:
        """Name of the stage's directories inside the run directory."""
        return f"stage_{self.index + 1:02d}"


def sequential_stages(tasks: list[str]) -> list[Stage]:
    """One stage per task, in order: the stream of continual instruction tuning."""
    return [Stage(index=i, name=task, train=(task,), row=i) for i, task in enumerate(tasks)]
