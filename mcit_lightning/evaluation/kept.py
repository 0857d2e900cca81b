"""Tasks of an interrupted evaluation that are finished: their answers are kept, and scored as they were."""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mcit_lightning.data.splits import TaskSplit
from mcit_lightning.evaluation.metrics import AnswerMetric
from mcit_lightning.evaluation.predictions import Part, finished_parts, prediction_file


@dataclass(frozen=True)
class KeptTask:
    """What an interrupted evaluation has found out about a task."""

    parts: list[Part]
    score: float
    """Percent."""


def kept_tasks(
    root: Path, folder: str, splits: Mapping[str, TaskSplit], metrics: Mapping[str, AnswerMetric], batch_size: int
) -> dict[str, KeptTask]:
    """The finished tasks among `splits`; what there is of the others is deleted. For one process only.

    Args:
        root: the run directory.
        folder: of the stage.
        splits: task -> its test rows.
        metrics: task -> its metric, without any row yet.
        batch_size: of the evaluation. It matters to metrics that look at a batch.
    """
    found: dict[str, KeptTask] = {}
    for task, split in splits.items():
        parts = finished_parts(prediction_file(root, folder, task), len(split))
        if parts:
            found[task] = KeptTask(parts, _score(metrics[task], split, parts, batch_size))
    return found


def find_row(split: TaskSplit, number: int) -> int | None:
    """Position in the split of the row that has this number in its file; None if the split does not use it."""
    position = bisect_left(range(len(split)), number, key=lambda place: split[place].row)
    return position if position < len(split) and split[position].row == number else None


def _score(metric: AnswerMetric, split: TaskSplit, parts: list[Part], batch_size: int) -> float:
    """The score of answers that were given earlier, in the batches in which they were given."""
    metric.distributed_available_fn = lambda: False  # this process has the rows of all, and no other is here
    for part in parts:
        for start in range(0, len(part.rows), batch_size):
            rows = part.rows[start : start + batch_size]
            positions = [find_row(split, int(row["index"])) for row in rows]
            samples = [split[position] for position in positions if position is not None]
            assert len(samples) == len(rows), "the run's identity covers what decides which rows are used"
            texts = [str(row["text"]) for row in rows]
            metric.update(texts, [sample.reference for sample in samples], [sample.extra for sample in samples])
    return float(metric.compute())
