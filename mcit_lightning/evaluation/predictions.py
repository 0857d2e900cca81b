"""The answers of an evaluation as JSON lines: one file per stage and task, joined from all processes."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcit_lightning.evaluation.files import write_atomic


def prediction_file(root: Path, folder: str, task: str) -> Path:
    """Where the answers to a task after a stage lie (`folder`: `stage_01`, ... or `zero_shot`)."""
    return root / "predictions" / folder / f"{task}.jsonl"


def read_predictions(root: Path, folder: str | None, task: str) -> dict[int, dict[str, Any]]:
    """Predictions of a task after a stage by row number; empty if the stage did not evaluate the task."""
    if folder is None or not prediction_file(root, folder, task).is_file():
        return {}
    return {int(row["index"]): row for row in _read(prediction_file(root, folder, task))}


def write_part(path: Path, rank: int, rows: Sequence[dict[str, Any]]) -> None:
    """Write one process's share of a prediction file."""
    lines = (json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
    write_atomic(_part(path, rank), "".join(lines))


def merge_parts(path: Path, world_size: int, expected: int | None) -> int:
    """Join the shares of all processes in the order of `index` and delete them.

    Args:
        path: the prediction file to write.
        world_size: number of processes, each of which has written its part.
        expected: rows of the test split; None if the evaluation was cut short on purpose.

    Returns:
        Number of rows.

    Raises:
        RuntimeError: a part is missing, a row occurs twice or rows are missing; the message names the counts.
    """
    parts = [_part(path, rank) for rank in range(world_size)]
    missing = [rank for rank, part in enumerate(parts) if not part.is_file()]
    if missing:
        raise RuntimeError(
            f"{path}: the predictions of ranks {missing} of {world_size} are not there; "
            "the run directory must be on a file system that all processes share"
        )
    shares = [_read(part) for part in parts]
    rows = sorted((row for share in shares for row in share), key=lambda row: int(row["index"]))
    counts = Counter(int(row["index"]) for row in rows)
    if len(counts) != len(rows) or (expected is not None and len(rows) != expected):
        repeated = len(rows) - len(counts)
        wanted = "" if expected is None else f" of {expected}"
        raise RuntimeError(
            f"{path}: {len(rows)} predictions for {len(counts)}{wanted} different rows ({repeated} repeated; "
            f"per rank {[len(share) for share in shares]}); every test row must be evaluated exactly once"
        )
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    for part in parts:
        part.unlink()
    return len(rows)


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f".{path.stem}.rank{rank}.part")


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
