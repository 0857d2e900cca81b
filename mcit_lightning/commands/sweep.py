"""`mcit-lightning sweep EXPERIMENT|PLAN [key=value ...]`: several strategies, task orders and seeds, and their comparison."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcit_lightning.commands.numbers import at_least

if TYPE_CHECKING:
    from mcit_lightning.sweep.execute import Outcome
    from mcit_lightning.sweep.plan import Cell, SweepPlan

KEYS = {
    "seeds": "0,1,2 or 0-4: a cell for each (0,1,2)",
    "orders": "3: that many seeded orders of the tasks, the first the experiment's own; or [[a,b],[b,a]] (1)",
    "strategies": "sequential,dmole: on an experiment, a run for each",
    "only": "NAME,...: of a plan, these runs",
    "out": "DIR: the sweep's folder (runs/sweep_NAME)",
    "reference": "RUN: what the others are compared with (sequential if there, else the best)",
    "dry_run": "true: list the cells and stop",
}
"""Keys that the sweep itself takes, and how they are written."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment or plan, the keys, and how many at once."""
    parser.add_argument(
        "plan", metavar="EXPERIMENT|PLAN",
        help="an experiment, or a YAML file with `runs` (name: {experiment, overrides}), `common` overrides, `seeds` and "
        "`orders`",
    )  # fmt: skip
    parser.add_argument(
        "settings", nargs="*", metavar="key=value",
        help="keys of the sweep (below); RUN:key=value changes one run, any other key=value all of them",
    )  # fmt: skip
    parser.add_argument("--jobs", type=at_least(1), default=1, metavar="N", help="cells to run at once (%(default)s)")
    parser.add_argument("--threads", type=at_least(1), metavar="N", help="CPU threads of each cell (left to torch)")
    parser.add_argument("--gpus", default="", metavar="0,1,...", help="GPUs to share out among the jobs (all to each)")
    keys = "\n".join(f"  {key + '=':12}{text}" for key, text in KEYS.items())
    parser.epilog = (
        f"keys:\n{keys}\n\n{parser.epilog}\n"
        "A finished cell is not run again and an interrupted one continues: the same command completes the sweep.\n"
        "exit status: 0 all cells are finished, 1 some failed, 2 bad input"
    )


def command(options: argparse.Namespace) -> int:
    """Run the cells that are not finished, then compare all that are.

    Returns:
        0 if every cell is finished, 1 if one failed or is being run by another process.

    Raises:
        ValueError: the plan, a key or a run's configuration is wrong; nothing has run then.
        OSError: the folder cannot be written.
    """
    import logging

    from rich.console import Console

    from mcit_lightning.commands.quiet import quiet_libraries
    from mcit_lightning.sweep.execute import execute

    plan, own = make_plan(options.plan, options.settings)
    gpus = [part for part in options.gpus.split(",") if part]
    if gpus and len(gpus) % options.jobs:
        raise ValueError(f"--gpus: {len(gpus)} GPUs cannot be shared out evenly among {options.jobs} jobs")
    out = Path(own.get("out") or Path("runs") / f"sweep_{Path(options.plan).stem}").absolute()
    if (out / "state.json").exists():
        raise ValueError(f"{out}: is the directory of a single run; choose another folder for the sweep with out=DIR")
    only = names(own.get("only", ""))
    cells = plan.cells(out, only)
    console = Console(highlight=False, soft_wrap=True, markup=False)
    if str(own.get("dry_run", "false")).lower() == "true":
        for cell in cells:
            console.print(f"{cell.folder}: {cell.experiment} {' '.join(cell.overrides)}")
        console.print(f"{len(cells)} cells")
        return 0
    quiet_libraries()
    out.mkdir(parents=True, exist_ok=True)
    plan.save(out, only)
    outcomes = execute(cells, jobs=options.jobs, threads=options.threads, gpus=gpus)
    _compare(out, own.get("reference"), console, outcomes)
    for outcome in (wrong := [outcome for outcome in outcomes if outcome.status in ("failed", "busy")]):
        logging.getLogger(__name__).error("%s", _complaint(outcome))
    console.print(f"{len(outcomes) - len(wrong)} of {len(outcomes)} cells are finished")
    return 1 if wrong else 0


def make_plan(source: str, settings: Sequence[str]) -> "tuple[SweepPlan, dict[str, str]]":
    """The plan that a command line asks for, and the sweep's own keys in it.

    Raises:
        ValueError: a key or value is wrong.
    """
    import yaml

    from mcit_lightning.loading import find_experiment
    from mcit_lightning.registry import nearest
    from mcit_lightning.sweep.plan import SweepPlan, SweepRun
    from mcit_lightning.sweep.runs import check_name, plan_runs, read_plan, strategy_runs

    own: dict[str, str] = {}
    common: list[str] = []
    single: dict[str, list[str]] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r}: write it as key=value, for example seeds=0,1,2")
        if key in ("seed", "order"):
            instead = f"seeds={value}" if key == "seed" else f"orders=[{value}]"
            raise ValueError(f"{setting}: a sweep has one or several of them; write {instead}")
        run, colon, inner = key.partition(":")
        if colon:
            single.setdefault(run, []).append(f"{inner}={value}")
        elif key in KEYS:
            own[key] = value
        else:
            common.append(setting)
    file = find_experiment(source)
    content: dict[str, Any] | None = read_plan(file)
    if content is not None:
        if "strategies" in own:
            raise ValueError(f"strategies={own['strategies']}: {file} is a plan that names its runs; use only=RUN,...")
        runs = plan_runs(content)
        common = [*(content.get("common") or ()), *common]
    elif "strategies" in own:
        runs = strategy_runs(source, names(own["strategies"]), common)
    else:
        check_name(file.stem, source)
        runs = {file.stem: SweepRun(source)}
    for name, overrides in single.items():
        if name not in runs:
            raise ValueError(f"{name}:{overrides[0]}: no run {name!r} in the sweep. {nearest(name, runs)}")
        runs[name] = replace(runs[name], overrides=(*runs[name].overrides, *overrides))
    plan = SweepPlan(runs, tuple(common))
    given = content or {}
    if (seeds := own.get("seeds", given.get("seeds"))) is not None:
        plan.seeds = parse_seeds(seeds)
    if (orders := own.get("orders", given.get("orders"))) is not None:
        plan.orders = parse_orders(yaml.safe_load(orders) if isinstance(orders, str) else orders)
    return plan, own


def names(text: str) -> list[str]:
    """`a,b` or `[a, b]` as a list."""
    return [part.strip() for part in text.strip("[] ").split(",") if part.strip()]


def parse_seeds(value: Any) -> list[int]:
    """`0,1,2`, `0-4`, `[0, 1]` or a list of numbers.

    Raises:
        ValueError: it is none of them, or names a seed twice.
    """
    parts = [str(part) for part in value] if isinstance(value, list) else names(str(value))
    seeds: list[int] = []
    for part in parts:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if match is None:
            raise ValueError(f"seeds={value}: {part!r} is no whole number; write seeds=0,1,2 or seeds=0-4")
        seeds.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"seeds={value}: must name at least one seed and each once; write seeds=0,1,2 or seeds=0-4")
    return seeds


def parse_orders(value: Any) -> int | list[list[str]]:
    """A number of orders, or the orders themselves.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    lists = isinstance(value, list) and value and all(isinstance(order, list) and order for order in value)
    if lists and all(isinstance(task, str) for order in value for task in order):
        if len({tuple(order) for order in value}) != len(value):
            raise ValueError(f"orders={value}: names an order twice")
        return [list(order) for order in value]
    raise ValueError(f"orders={value}: must be a number of orders, or lists of tasks such as [[a,b,c],[c,b,a]]")


def _compare(out: Path, reference: str | None, console: Any, outcomes: "Sequence[Outcome]") -> None:
    """Compare what is finished in the folder, also of earlier calls; nothing if there is none."""
    if not any(outcome.status in ("finished", "kept") for outcome in outcomes):
        return
    from mcit_lightning.commands.report import compare

    compare([out], out, reference, console)


def _complaint(outcome: "Outcome") -> str:
    cell: Cell = outcome.cell
    if outcome.status == "busy":
        return f"{cell.folder}: another process is running it; wait for it, then give the same command again"
    log = f" (log: {cell.log})" if cell.log.is_file() else ""
    return f"{cell.folder}: failed: {outcome.why}{log}"
