"""Scores on tasks that are never trained: how much of its general ability a model keeps through the sequence."""

from dataclasses import dataclass, field
from typing import Any

from mcit_lightning.evaluation.formatting import number_text


@dataclass
class HeldOut:
    """Scores by stage.

    Args:
        metrics: held-out task -> name of its metric.
        scores: stage, 1-based by the row of the accuracy matrix that it filled -> task -> percent; 0 is the pretrained model.
    """

    metrics: dict[str, str] = field(default_factory=dict)
    scores: dict[int, dict[str, float]] = field(default_factory=dict)

    def set(self, stage: int, task: str, score: float) -> None:
        """Enter a score."""
        self.scores.setdefault(stage, {})[task] = score

    def row(self, stage: int) -> dict[str, float]:
        """Task -> score after a stage; empty before it."""
        return self.scores.get(stage, {})

    def text(self, stage: int, task: str) -> str:
        """The score after a stage for reading, with the change against the pretrained model; a dash where there is none."""
        score, before = self.row(stage).get(task), self.row(0).get(task)
        change = score - before if stage and score is not None and before is not None else None
        return number_text(score) if change is None else f"{number_text(score)} ({number_text(change, signed=True)})"

    def retention(self, row: int | None) -> dict[str, str]:
        """Task -> `text` after the stage that filled a row of the matrix (None: before training)."""
        stage = 0 if row is None else row + 1
        return {task: self.text(stage, task) for task in self.row(stage)}

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {"metrics": self.metrics, "scores": {str(stage): row for stage, row in sorted(self.scores.items())}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "HeldOut":
        """Inverse of `to_dict`.

        Raises:
            TypeError: a part of it is no mapping, or a score no number.
            ValueError: a stage is no number.
        """
        _mapping(values)
        metrics, scores = _mapping(values.get("metrics", {})), _mapping(values.get("scores", {}))
        found = {
            int(stage): {task: float(score) for task, score in _mapping(row).items()} for stage, row in scores.items()
        }
        return cls(metrics, found)


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"held_out: {value!r} is no mapping")
    return value
