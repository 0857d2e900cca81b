"""What the benchmarks share: variants in turn, ratios within a round, one table and one JSON file.

A ratio is taken within a round, in which all variants run one after the other, so that what else the machine does hits all of
them. A table gives the median of the rounds' ratios and their spread (10th to 90th percentile).
"""

import argparse
import importlib.metadata
import importlib.util
import json
import logging
import math
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

HAS_PEFT = importlib.util.find_spec("peft") is not None
CPU_FEATURES = ("amx_bf16", "avx512_bf16", "avx512_f", "avx2")


@dataclass
class Row:
    """One line of a table: how much of `unit` a variant needs, relative to another."""

    what: str
    """The variant."""
    to: str
    """What it is divided by."""
    ratio: float
    low: float
    high: float
    value: float | None = None
    """Median in `unit`, which depends on the machine."""
    unit: str = "s"
    target: str = ""
    """For example `<= 1.05`; empty where there is none."""
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if not self.target:
            return None
        sign, _, bound = self.target.partition(" ")
        return self.ratio <= float(bound) if sign == "<=" else self.ratio >= float(bound)


def in_turn(variants: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every variant once a round, each round beginning with another, and collect what they return."""
    names, found = list(variants), {name: [] for name in variants}  # type: dict[str, list[float]]
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            found[name].append(variants[name]())
    return found


def ratio_row(what: str, to: str, samples: Mapping[str, Sequence[float]], **fields: Any) -> Row:
    """The row of `what` relative to `to`, from the samples of the same rounds.

    Args:
        **fields: further fields of the row. `invert=True` divides the other way round: how many times faster `what` is.
    """
    pairs = list(zip(samples[what], samples[to], strict=True))
    invert = fields.pop("invert", False)
    ratios = sorted(b / a if invert else a / b for a, b in pairs)
    low, high = ratios[math.floor(0.1 * (len(ratios) - 1))], ratios[math.ceil(0.9 * (len(ratios) - 1))]
    name = fields.pop("name", what)
    value = fields.pop("value", statistics.median(samples[what]))
    return Row(name, fields.pop("base", to), statistics.median(ratios), low, high, value, **fields)


def parser(text: str | None, rounds: int) -> argparse.ArgumentParser:
    """A command line with what every benchmark takes."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--rounds", type=int, default=rounds)
    made.add_argument("--threads", type=int, help="of torch; default: its own choice")
    made.add_argument(
        "--cpu-time", action="store_true", help="count CPU time: for a machine that is busy with other work"
    )
    made.add_argument("--json", type=Path, help="also write the rows there")
    return made


def prepare(options: argparse.Namespace) -> Callable[[], float]:
    """Set threads and logging as asked for; returns the clock."""
    if options.threads:
        torch.set_num_threads(options.threads)
    disable_progress_bar()
    warnings.filterwarnings("ignore")  # advice for real training
    for name in ("transformers", "lightning", "lightning.pytorch", "lightning.fabric", "mcit_lightning", "callbacks"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return time.process_time if options.cpu_time else time.perf_counter


def report(title: str, rows: Sequence[Row], options: argparse.Namespace) -> None:
    """Print the table, and write it as JSON where asked to."""
    table = Table(title=f"{title}; {machine()}")
    for column in ("what", "relative to", "ratio (10 % to 90 %)", "value", "target", ""):
        table.add_column(column, justify="left" if column in ("what", "relative to", "") else "right")
    for row in rows:
        value = "" if row.value is None else f"{row.value:.3g} {row.unit}"
        verdict = {None: "", True: "met", False: "MISSED"}[row.met]
        spread = f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"
        table.add_row(row.what, row.to, spread, value, row.target, " ".join(filter(None, (verdict, row.note))))
    Console(file=sys.stdout, width=None if sys.stdout.isatty() else 150).print(table)
    if options.json:
        about = {key: value for key, value in vars(options).items() if key != "json"}
        content = {"title": title, "about": about | {"machine": machine()}, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")


def machine() -> str:
    """The machine in general words: threads, instructions, versions."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    best = next((name for name in CPU_FEATURES if capabilities.get(name)), "no vector instructions known")
    names = ("torch", "transformers", "lightning", *(["peft"] if HAS_PEFT else []))
    versions = ", ".join(f"{name} {importlib.metadata.version(name).partition('+')[0]}" for name in names)
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{platform.machine()} CPU ({best}), {torch.get_num_threads()} threads; {versions}"
