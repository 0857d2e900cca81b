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

    A sample may be routed to several tasks, or to none. It counts as right if the first one is its own.

    Args:
        root: the run directory.
        folder: the stage's folder.
        tasks: the evaluated tasks.
        learnt: the tasks learnt so far; others are in `confusion`, `rejected` and `experts`, but not in `accuracy` and `among`.

    Returns:
        * `accuracy`: percent of the samples of learnt tasks whose first task is their own;
        * `among`: percent of them whose own task is one of those that they were routed to;
        * `confusion`: true task -> first routed task or `none` -> samples;
        * `rejected`: true task -> percent of its samples that were routed to no task;
        * `experts`: true task -> mean number of tasks that its samples were routed to.

        None if the predictions do not say where they were routed.
    """
    routes: dict[str, list[list[str]]] = {}
    for task in tasks:
        rows = [row["routed_to"] for row in read_predictions(root, folder, task).values() if "routed_to" in row]
        if rows:
            routes[task] = rows
    if not routes:
        return None
    known = {task: routes[task] for task in learnt if task in routes}
    return {
        "accuracy": _percent([task in own[:1] for task, rows in known.items() for own in rows]),
        "among": _percent([task in own for task, rows in known.items() for own in rows]),
        "confusion": {task: dict(Counter(own[0] if own else NOWHERE for own in rows)) for task, rows in routes.items()},
        "rejected": {task: _percent([not own for own in rows]) for task, rows in routes.items()},
        "experts": {task: sum(map(len, rows)) / len(rows) for task, rows in routes.items()},
    }


def _percent(hits: list[bool]) -> float | None:
    return 100 * sum(hits) / len(hits) if hits else None
