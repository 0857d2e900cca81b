"""What a sweep runs: a cell for every run (a strategy with its settings), task order and seed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.files import write_atomic
from mcit_lightning.loading import experiments_dir, find_experiment, flatten, load_config
from mcit_lightning.registry import nearest
from mcit_lightning.sweep.orders import permutations

PLAN_FILE = "sweep.yaml"
"""What a sweep's folder says about itself."""
KEYS = ("common", "runs", "seeds", "orders")
"""Keys of a plan file."""
RUN_KEYS = ("experiment", "overrides")


@dataclass(frozen=True)
class SweepRun:
    """A strategy with its settings: an experiment and what is changed in it.

    Args:
        experiment: name or path of the experiment.
        overrides: `key=value` strings, applied after the common ones.
    """

    experiment: str
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One run directory of a sweep.

    Args:
        run: name of the run in the plan.
        number: which of its orders, from 1.
        seed: the run's seed.
        experiment: name or path of the experiment.
        overrides: everything that is changed in it, without the folder.
        folder: the run directory.
    """

    run: str
    number: int
    seed: int
    experiment: str
    overrides: tuple[str, ...]
    folder: Path

    @property
    def log(self) -> Path:
        """Where the output of the run's process goes."""
        return self.folder.with_name(f"{self.folder.name}.log")

    def config(self) -> ExperimentConfig:
        """The cell's configuration."""
        return load_config(find_experiment(self.experiment), [*self.overrides, f"out={self.folder}"])


@dataclass
class SweepPlan:
    """The cells of a sweep.

    Args:
        runs: name -> experiment and overrides.
        common: overrides of every run.
        seeds: a cell for each.
        orders: number of seeded permutations of each run's own task order, itself the first; or lists of tasks.
    """

    runs: dict[str, SweepRun]
    common: tuple[str, ...] = ()
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    orders: int | list[list[str]] = 1
    _orders: dict[str, list[list[str]]] = field(default_factory=dict, init=False, repr=False)
    _own: dict[str, list[str]] = field(default_factory=dict, init=False, repr=False)

    def cells(self, out: Path, only: Sequence[str] = ()) -> list[Cell]:
        """Every cell, checked: seed by seed, so that whole rows of the comparison are there early.

        The first order of a run lies in `<out>/<run>/seed<k>`, the others in `<out>/<run>/order<n>/seed<k>`.

        Args:
            out: the sweep's folder.
            only: names of the runs that are wanted; none means all.

        Raises:
            ValueError: a run's experiment, override, order or seed is wrong; the message names the run.
        """
        for name in only:
            if name not in self.runs:
                raise ValueError(f"only: no run {name!r} in the sweep. {nearest(name, self.runs)}")
        chosen = {name: self.orders_of(name) for name in self.runs if not only or name in only}
        return [
            self._cell(out, name, number, seed)
            for seed in self.seeds
            for number in range(1, max(map(len, chosen.values())) + 1)
            for name, orders in chosen.items()
            if number <= len(orders)
        ]

    def orders_of(self, name: str) -> list[list[str]]:
        """The task orders of a run; every one is checked with the rest of the run's configuration.

        Raises:
            ValueError: as `cells`.
        """
        if name not in self._orders:
            run = self.runs[name]
            settings = [*self.common, *run.overrides, f"seed={self.seeds[0]}"]
            try:
                file = find_experiment(run.experiment)
                own = load_config(file, settings).order
                wanted = permutations(own, self.orders) if isinstance(self.orders, int) else self.orders
                for order in wanted:
                    if order != own:
                        load_config(file, [*settings, order_override(order)])
            except ValueError as error:
                raise ValueError(f"run {name!r}: {error}") from error
            self._own[name], self._orders[name] = own, wanted
        return self._orders[name]

    def _cell(self, out: Path, name: str, number: int, seed: int) -> Cell:
        run, order = self.runs[name], self._orders[name][number - 1]
        parts = [name] if number == 1 else [name, f"order{number}"]
        given = () if order == self._own[name] else (order_override(order),)
        overrides = (*self.common, *run.overrides, *given, f"seed={seed}")
        return Cell(name, number, seed, run.experiment, overrides, out.joinpath(*parts, f"seed{seed}"))

    def save(self, out: Path, only: Sequence[str] = ()) -> None:
        """Write `sweep.yaml` into the sweep's folder; runs and seeds of an earlier plan in the same folder stay in it.

        Raises:
            ValueError: the earlier plan had other orders under the same numbers.
        """
        path = out / PLAN_FILE
        before: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
        runs: dict[str, Any] = dict(before.get("runs", {}))
        for name in self.runs:
            if only and name not in only:
                continue
            orders = self.orders_of(name)
            known = runs.get(name, {}).get("orders", [])
            for number, (old, new) in enumerate(zip(known, orders, strict=False), start=1):
                if old != new:
                    raise ValueError(
                        f"{path}: order {number} of run {name!r} is {old} there and {new} now. "
                        "Name the earlier orders first, or choose another folder with out=DIR"
                    )
            entry = {"experiment": self.runs[name].experiment, "overrides": list(self.runs[name].overrides)}
            runs[name] = {**entry, "orders": max(known, orders, key=len)}
        seeds = sorted({*before.get("seeds", []), *self.seeds})
        content = {"common": list(self.common), "seeds": seeds, "runs": runs}
        write_atomic(path, yaml.safe_dump(content, sort_keys=False, default_flow_style=None, width=120))


def order_override(order: Sequence[str]) -> str:
    """The override that sets a task order."""
    return f"order=[{','.join(order)}]"


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
