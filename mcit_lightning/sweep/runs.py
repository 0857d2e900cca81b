"""The runs of a sweep: from a plan file, or from the names of strategies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mcit_lightning.loading import experiments_dir, find_experiment, flatten, load_config
from mcit_lightning.registry import nearest
from mcit_lightning.sweep.plan import SweepRun

KEYS = ("common", "runs", "seeds", "orders")
"""Keys of a plan file."""
RUN_KEYS = ("experiment", "overrides")


def read_plan(path: Path) -> dict[str, Any] | None:
    """The content of a plan file; None if the file is an experiment.

    Raises:
        ValueError: it is a plan with a wrong key or type; names file, key and what is right.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # the loader of experiments says what is wrong
    if not isinstance(content, dict) or "runs" not in content:
        return None
    for key in content:
        if key not in KEYS:
            raise ValueError(f"{path}: {key}: is no key of a sweep's plan. {nearest(str(key), KEYS)}")
    runs = content["runs"]
    if not isinstance(runs, dict) or not runs:
        raise ValueError(f"{path}: runs: must map names to {{experiment: NAME, overrides: [key=value, ...]}}")
    for name, run in runs.items():
        where = f"{path}: runs.{name}"
        check_name(str(name), where)
        if not isinstance(run, dict) or not isinstance(run.get("experiment"), str):
            raise ValueError(f"{where}: must be {{experiment: NAME, overrides: [key=value, ...]}}, not {run!r}")
        for key in run:
            if key not in RUN_KEYS:
                raise ValueError(f"{where}.{key}: is no key of a run. {nearest(str(key), RUN_KEYS)}")
        _strings(run.get("overrides", []), f"{where}.overrides")
    _strings(content.get("common", []), f"{path}: common")
    return content


def plan_runs(content: Mapping[str, Any]) -> dict[str, SweepRun]:
    """The runs of a plan file's content."""
    return {
        str(name): SweepRun(run["experiment"], tuple(run.get("overrides") or ()))
        for name, run in content["runs"].items()
    }


def strategy_runs(experiment: str, strategies: Sequence[str], overrides: Sequence[str]) -> dict[str, SweepRun]:
    """A run per strategy on one experiment.

    For each strategy this is, if there is such a file beside the experiment or among the shipped ones, the experiment named
    `<strategy>_<experiment>` (where the experiment's own name may begin with its own strategy: `branchlora_llava7b` belongs to
    `dmole_llava7b`), because it has the strategy's own settings. Otherwise the experiment itself with `strategy.name` changed
    and, where `_base/<strategy>.yaml` exists, with the callbacks and settings that this file asks for.

    Raises:
        ValueError: the experiment is wrong, or a strategy is named twice.
    """
    file = find_experiment(experiment)
    own = str(load_config(file, overrides).strategy["name"])
    stem = file.stem.removeprefix(f"{own}_")
    runs: dict[str, SweepRun] = {}
    for name in strategies:
        check_name(name, "strategies")
        if name in runs:
            raise ValueError(f"strategies: names {name!r} twice")
        siblings = [folder / f"{name}_{stem}.yaml" for folder in (file.parent, experiments_dir())]
        found = next((path for path in siblings if path.is_file()), None)
        if name == own:
            runs[name] = SweepRun(experiment)
        elif found is not None:
            runs[name] = SweepRun(found.stem if found.parent == experiments_dir() else str(found))
        else:
            runs[name] = SweepRun(experiment, (*_settings_of(name), f"strategy.name={name}"))
    return runs


def _settings_of(strategy: str) -> list[str]:
    """What `_base/<strategy>.yaml` asks for, as overrides."""
    path = experiments_dir() / "_base" / f"{strategy}.yaml"
    if not path.is_file():
        return []
    content = {key: value for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items() if key != "base"}
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    leaves = flatten({key: value for key, value in content.items() if key not in lists})
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True, width=100_000).strip().removesuffix('...').strip()}"
        for key, value in {**lists, **leaves}.items()
    ]


def check_name(name: str, where: str) -> None:
    """A run's name becomes a folder's.

    Raises:
        ValueError: it cannot be one.
    """
    if not name or not all(char.isalnum() or char in "-_." for char in name) or name.startswith("."):
        raise ValueError(f"{where}: {name!r} becomes the name of a folder; use letters, digits, '.', '-' and '_'")


def _strings(values: Any, where: str) -> None:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: must be a list of 'key=value' strings, not {values!r}")
