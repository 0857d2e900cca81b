"""The answers of an evaluation as JSON lines: one file per stage and task, joined from all processes."""

import json
import logging
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcit_lightning.evaluation.files import write_atomic

logger = logging.getLogger(__name__)


def prediction_file(root: Path, folder: str, task: str) -> Path:
    """Where the answers to a task after a stage lie (`folder`: `stage_01`, ... or `zero_shot`)."""
    return root / "predictions" / folder / f"{task}.jsonl"


def read_predictions(root: Path, folder: str | None, task: str) -> dict[int, dict[str, Any]]:
    """Predictions of a task after a stage by row number; empty if the stage did not evaluate the task."""
    if folder is None or not prediction_file(root, folder, task).is_file():
        return {}
    return {int(row["index"]): row for row in _read(prediction_file(root, folder, task))}


@dataclass(frozen=True)
class Part:
    """One process's share of the answers to a task, in the order in which they were made, and what it cost."""

    rows: list[dict[str, Any]]
    seconds: float = 0.0
    routing: float = 0.0
    """Seconds of these that went into deciding where samples are routed."""
    first_routing: float = 0.0
    """Those of batches that held samples which the router had not seen before."""
    examined: float = 0.0
    """Number of such samples."""
    generation: float = 0.0
    """Seconds that went into generating the answers."""


def write_part(path: Path, rank: int, rows: Sequence[dict[str, Any]], **seconds: float) -> None:
    """Write one process's share of a prediction file.

    Args:
        path: the prediction file that it will be a part of.
        rank: the process.
        rows: its rows.
        **seconds: the other fields of `Part`.
    """
    write_atomic(_part(path, rank), json.dumps({"rows": list(rows), **seconds}, ensure_ascii=False, default=str))


def finished_parts(path: Path, expected: int) -> list[Part]:
    """What an interrupted evaluation has left of a task: the shares of all processes, if together they hold every row once.

    Returns an empty list, and deletes what there is, if rows are missing or repeated or a file is damaged: the task is then
    evaluated again.
    """
    try:
        parts = [_read_part(part) for part in _parts(path)]
        numbers = [int(row["index"]) for part in parts for row in part.rows]
    except (ValueError, KeyError, TypeError) as error:
        logger.warning(
            "%s: a part of an interrupted evaluation is damaged (%s); the task is evaluated again", path, error
        )
        numbers = []
    if len(numbers) == expected == len(set(numbers)):
        return parts
    for part in _parts(path):
        part.unlink()
    return []


def drop_parts(root: Path, folder: str) -> None:
    """Delete the parts of a stage's evaluation: it is finished, or its stage is trained again."""
    for part in (root / "predictions" / folder).glob(".*.part"):
        part.unlink()


def merge_parts(path: Path, world_size: int, expected: int | None) -> int:
    """Join the shares of all processes in the order of `index`; `drop_parts` then deletes them.

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
    return write_predictions(path, [_read_part(part) for part in parts], expected)


def write_predictions(path: Path, parts: Sequence[Part], expected: int | None) -> int:
    """Write a prediction file; arguments, result and errors as for `merge_parts`."""
    shares = [part.rows for part in parts]
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
    return len(rows)


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f".{path.stem}.rank{rank}.part")


def _parts(path: Path) -> list[Path]:
    """The parts of a prediction file by rank."""
    pattern = re.compile(rf"\.{re.escape(path.stem)}\.rank(\d+)\.part")
    found = {match: file for file in path.parent.glob(".*.part") if (match := pattern.fullmatch(file.name))}
    return [found[match] for match in sorted(found, key=lambda match: int(match[1]))]


def _read_part(part: Path) -> Part:
    return Part(**json.loads(part.read_text(encoding="utf-8")))


def _read(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]
