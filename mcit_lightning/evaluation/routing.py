"""How often a strategy's router found the right task, counted from the predictions."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcit_lightning.evaluation.predictions import read_predictions

NOWHERE = "none"
"""Column of the samples that were routed to no task: the pretrained model answered."""


def routing_summary(root: Path, folder: str, tasks: Sequence[str], learnt: Sequence[str]) -> dict[str, Any] | None:
    """Accuracy and confusion of the router after a stage.

    A sample counts as right if the first task that it was routed to is its own.

    Args:
        root: the run directory.
        folder: the stage's folder.
        tasks: the evaluated tasks.
        learnt: the tasks learnt so far; others are in the confusion but not in the accuracy.

    Returns:
        `accuracy` (percent over the samples of learnt tasks) and `confusion` (true task -> routed task or `none` -> samples);
        None if the predictions do not say where they were routed.
    """
    confusion: dict[str, dict[str, int]] = {}
    for task in tasks:
        rows = [row for row in read_predictions(root, folder, task).values() if "routed_to" in row]
        if rows:
            confusion[task] = dict(Counter(row["routed_to"][0] if row["routed_to"] else NOWHERE for row in rows))
    if not confusion:
        return None
    known = [confusion[task] for task in learnt if task in confusion]
    total = sum(sum(counts.values()) for counts in known)
    right = sum(confusion[task].get(task, 0) for task in learnt if task in confusion)
    return {"accuracy": 100 * right / total if total else None, "confusion": confusion}
