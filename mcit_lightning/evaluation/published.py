"""Published results as data, so that a run's row can stand beside those of its benchmark and protocol.

The numbers are in `published.yaml`; docs/published.md says which may be compared.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

FILE = Path(__file__).with_name("published.yaml")
Evidence = Literal["paper", "secondary", "rerun"]


@dataclass(frozen=True)
class Protocol:
    """A way of training and scoring within which results can be compared.

    Args:
        name: of the protocol.
        benchmark: the file in `experiments/_base` without its ending.
        tasks: in the order of the per-task scores.
        backbone: the model that all rows start from.
        convention: how scores and aggregates are made, in words.
    """

    name: str
    benchmark: str
    tasks: tuple[str, ...]
    backbone: str
    convention: str


@dataclass(frozen=True)
class PublishedRow:
    """One method's published scores. Per-task tuples are in percent, in the protocol's order, and empty if not published.

    Args:
        protocol: what it may be compared with.
        method: as its authors call it.
        source: paper and table, or thread.
        evidence: `paper`, `secondary` (quoted by others) or `rerun` (somebody's own run of the published code).
        zero_shot: before any training.
        just_learnt: A[i][i].
        last: A[T][i].
        average: mean over all stages of A[t][i].
        backward: mean over later stages of A[t][i] - A[i][i]; one entry less.
        stages: mean over seen tasks after each stage.
        aggregates: names as in `results.json`, and `zero_shot`, `backward` for the means of those columns.
    """

    protocol: Protocol
    method: str
    source: str
    evidence: Evidence
    zero_shot: tuple[float, ...] = ()
    just_learnt: tuple[float, ...] = ()
    last: tuple[float, ...] = ()
    average: tuple[float, ...] = ()
    backward: tuple[float, ...] = ()
    stages: tuple[float, ...] = ()
    aggregates: Mapping[str, float] = field(default_factory=dict)


@cache
def published() -> tuple[PublishedRow, ...]:
    """All rows, in the order of the file."""
    content = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    protocols = {name: _protocol(name, entry) for name, entry in content["protocols"].items()}
    return tuple(_row(entry, protocols) for entry in content["rows"])


def published_for(tasks: tuple[str, ...] | list[str]) -> list[PublishedRow]:
    """The rows whose protocol has exactly these tasks in this order."""
    return [row for row in published() if row.protocol.tasks == tuple(tasks)]


def _protocol(name: str, entry: dict[str, Any]) -> Protocol:
    return Protocol(name, **{**entry, "tasks": tuple(entry["tasks"])})


def _row(entry: dict[str, Any], protocols: Mapping[str, Protocol]) -> PublishedRow:
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    values["protocol"] = protocols[entry["protocol"]]
    return PublishedRow(**values)
