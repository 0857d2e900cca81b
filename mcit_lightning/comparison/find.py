"""Finding runs: run directories that are named, or that lie below a named folder such as a sweep's."""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mcit_lightning.allocation import natural
from mcit_lightning.evaluation.files import read_checked_json
from mcit_lightning.evaluation.open_run import STATE_FILE, load_run, read_settings
from mcit_lightning.evaluation.results import RESULTS_FILE, Results
from mcit_lightning.loading import flatten

DEEPEST = 5
"""How far below a named folder runs are looked for."""
PLAN_FILE = "sweep.yaml"


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        folder: its directory.
        name: of its method: the folder's name, without the parts that say seed and order.
        results: what it found.
        settings: its resolved configuration, dotted keys; empty if the file is not there. Paths below the data's folder do not
            say where that is, so that runs of two machines are alike.
        config: the same, nested.
    """

    folder: Path
    name: str
    results: Results
    settings: dict[str, Any]
    config: dict[str, Any]


def find_runs(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Load every finished run.

    Args:
        paths: run directories, or folders of them.

    Returns:
        The runs, methods in the order of the sweep's plan if there is one; and what was left out, with the reason.

    Raises:
        ValueError: a path holds no run, a run is damaged, or none is finished.
    """
    runs: list[Run] = []
    left_out: list[str] = []
    seen: set[Path] = set()
    for path in paths:
        for folder, name in _folders(path):
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            if (reason := _unfinished(folder)) is not None:
                left_out.append(f"{folder} ({reason})")
                continue
            _, config = read_settings(folder)
            runs.append(Run(folder, name, load_run(folder), _portable(flatten(config)), config))
    if not runs:
        raise ValueError(f"no run is finished: {'; '.join(left_out)}. Continue them first")
    return runs, left_out


def _portable(settings: dict[str, Any]) -> dict[str, Any]:
    root = settings.get("data.root")
    if not isinstance(root, str) or not root:
        return settings
    return {
        key: value.replace(root, "${data.root}", 1) if isinstance(value, str) and value.startswith(root) else value
        for key, value in settings.items()
    }


def _folders(path: Path) -> list[tuple[Path, str]]:
    """The run directories that a path means, and the names of their methods."""
    if _is_run(path):
        return [(path, _name(path.absolute()))]
    if not path.is_dir():
        raise ValueError(f"{path}: no such folder; name run directories or a folder of them, for example runs/my_sweep")
    found = [(folder, _name(folder.absolute(), path.absolute())) for folder in _below(path, DEEPEST)]
    if not found:
        raise ValueError(f"{path}: is no run directory, and there is none in it: nothing holds a {RESULTS_FILE}")
    plan = _planned(path)
    return sorted(found, key=lambda item: plan.index(item[1]) if item[1] in plan else len(plan))


def _is_run(folder: Path) -> bool:
    return (folder / RESULTS_FILE).is_file() or (folder / STATE_FILE).is_file()


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Run directories below a folder, not those inside of others; a folder's own before those of its folders."""
    inside = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    inside.sort(key=lambda path: natural(path.name))
    runs = [path for path in inside if _is_run(path)]
    yield from runs
    for path in inside:
        if depth > 1 and path not in runs:
            yield from _below(path, depth - 1)


def _name(folder: Path, top: Path | None = None) -> str:
    """The folder's name below `top` without `seed<k>` and `order<n>` at its end; its own if nothing else is left."""
    parts = list(folder.relative_to(top).parts if top else folder.parts[-3:])
    while parts and re.fullmatch(r"(seed|order)[-_]?\d+", parts[-1]):
        parts.pop()
    if not parts:
        return (top or folder).name
    return "/".join(parts) if top else parts[-1]


def _planned(path: Path) -> list[str]:
    """Names of the runs in the order of a sweep's plan."""
    try:
        content = yaml.safe_load((path / PLAN_FILE).read_text(encoding="utf-8"))
        return list(content["runs"])
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError):  # a plan only sorts
        return []


def _unfinished(folder: Path) -> str | None:
    """Why a run cannot be compared yet, or None."""
    try:
        finished, stages = _state(folder / STATE_FILE)
    except ValueError:
        return f"its {STATE_FILE} is damaged"
    if not (folder / RESULTS_FILE).is_file():
        return "nothing was evaluated yet"
    return None if finished else f"not finished, {stages} stages are"


def _state(path: Path) -> tuple[bool, int]:
    """Whether a run is finished, and how many of its stages are; without the file, it is a copy of the results alone.

    Raises:
        ValueError: the file is damaged.
    """
    if not os.path.lexists(path):
        return True, 0
    if not path.is_file():  # reading a pipe would wait for ever
        raise ValueError(f"{path}: is not a file")
    values = read_checked_json(path.read_text(encoding="utf-8"))
    finished, steps = values.get("finished"), values.get("steps", [])
    if not isinstance(finished, bool) or not isinstance(steps, list):
        raise ValueError(f"{path}: does not say whether the run is finished")
    return finished, len(steps)
