"""What a sweep runs: a cell for every run (a strategy with its settings), task order and seed."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.files import write_atomic
from mcit_lightning.loading import find_experiment, load_config
from mcit_lightning.registry import nearest
from mcit_lightning.sweep.orders import permutations

PLAN_FILE = "sweep.yaml"
"""What a sweep's folder says about itself."""


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
