"""Opening the directory of a run that somebody named: its results and its configuration, or one clear error."""

from pathlib import Path
from typing import Any

import yaml

from mcit_lightning.evaluation.results import RESULTS_FILE, Results

STATE_FILE = "state.json"
LARGEST_SETTINGS = 200_000
"""Keys and values of a configuration, at most: aliases in a YAML file can stand for more than memory holds, or for themselves."""


def load_run(root: Path) -> Results:
    """The results of a run directory.

    Raises:
        ValueError: it is none, nothing was evaluated yet, or `results.json` is damaged.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; name a run directory, for example runs/quickstart")
    if not (root / RESULTS_FILE).is_file():
        if (root / STATE_FILE).is_file():
            raise ValueError(f"{root}: the run has no {RESULTS_FILE} yet, as nothing was evaluated; continue it first")
        inside = sorted(path.parent.name for path in root.glob(f"*/{RESULTS_FILE}"))
        hint = f"; its folder {inside[0]} is one" if inside else ""
        raise ValueError(f"{root}: is no run directory, it holds no {RESULTS_FILE}{hint}")
    return Results.load(root)


def read_settings(root: Path) -> tuple[str, dict[str, Any]]:
    """The text of a run's `config.yaml` and its content; empty if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    path = root / "config.yaml"
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
        _check_size(content)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        first = "nested too deeply" if isinstance(error, RecursionError) else str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be read as YAML ({first}). Restore it from a copy, or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no mapping of keys to values. Restore it from a copy, or remove it")
    return text, content


def _check_size(content: Any) -> None:
    """Go through all values, those that aliases repeat included.

    Raises:
        ValueError: there are more than `LARGEST_SETTINGS`.
    """
    seen, left = 0, [content]
    while left:
        value = left.pop()
        inside = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        seen += 1 + len(inside)
        if seen > LARGEST_SETTINGS:
            raise ValueError("its aliases repeat values too often")
        left += inside
