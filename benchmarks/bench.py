"""All benchmarks in a CPU-sized form, and the table of `docs/performance.md`.

    python benchmarks/bench.py                      # `make bench`
    python benchmarks/bench.py --only growth
    python benchmarks/bench.py --wall-clock         # on a machine that does nothing else

Every benchmark is a process of its own, one after the other. Times are CPU time of one thread, which other work on the machine
changes little, unless `--wall-clock` asks for elapsed time on all threads. The rows go between the markers of the page, and as
JSON to `--out`, with the seconds that each benchmark took. A benchmark that fails leaves the page as it is.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from ratios import Row, machine, ratio_row

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "performance.md"
BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
BENCHMARKS: dict[str, list[str]] = {
    "training_step": ["--rounds", "5", "--layers", "4", "--steps", "6"],
    "evaluation": ["--rounds", "2", "--layers", "15", "--rows", "32"],
    "growth": ["--rounds", "5", "--layers", "4", "--repeats", "1", "--memory-rounds", "1"],
    "boundaries": ["--rounds", "2"],
    "adapters": ["--rounds", "7", "--shapes", "smollm2"],
    "dmole": ["--rounds", "3", "--divide", "2"],
}
"""Script and its arguments, to take less than 15 minutes together on one core, while another is busy."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS))
    parser.add_argument("--wall-clock", action="store_true", help="measure elapsed time: for a machine that is idle")
    parser.add_argument("--threads", type=int, help="of torch; default: 1, with --wall-clock its own choice")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder for the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE, help="the page to write the table into")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if BEGIN not in options.page.read_text(encoding="utf-8") or END not in options.page.read_text(encoding="utf-8"):
        parser.error(f"{options.page} has no lines {BEGIN} and {END}")
    options.threads = options.threads or (None if options.wall_clock else 1)
    if options.threads:
        torch.set_num_threads(options.threads)  # for what the page says
    took_file = options.out / "seconds.json"
    took: dict[str, dict[str, float]] = json.loads(took_file.read_text()) if took_file.is_file() else {}
    for name in options.only:
        took[name] = run(name, options)
        took_file.write_text(json.dumps(took, indent=2) + "\n", encoding="utf-8")
    rows = {
        name: rows_of(options.out / f"{name}.json") for name in BENCHMARKS if (options.out / f"{name}.json").is_file()
    }
    took = {name: took[name] for name in rows if name in took}
    write_page(options.page, rows, took, options)
    for name, seconds in {**took, "together": total(took)}.items():
        sys.stdout.write(f"{name:>14}: {seconds['wall']:4.0f} s, {seconds['cpu']:4.0f} s of CPU time\n")
    sys.stdout.write(f"{options.page} is written\n")


def total(took: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Sum over the benchmarks."""
    return {clock: sum(seconds[clock] for seconds in took.values()) for clock in ("wall", "cpu")}


def run(name: str, options: argparse.Namespace) -> dict[str, float]:
    """Run one benchmark; its table goes to the terminal.

    Returns:
        Seconds that it took: elapsed, and of CPU time.

    Raises:
        SystemExit: it failed.
    """
    command = [sys.executable, str(HERE / f"{name}.py"), *BENCHMARKS[name], "--json", str(options.out / f"{name}.json")]
    if not options.wall_clock:
        command += ["--cpu-time"]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(options.threads)} if options.threads else {})}
    sys.stdout.write(f"$ {' '.join(['python', f'benchmarks/{name}.py', *command[2:]])}\n")
    sys.stdout.flush()
    begin, before = time.perf_counter(), os.times()
    if subprocess.run(command, check=False, env=environment).returncode:
        raise SystemExit(f"{name} failed; {options.page} is left as it is")
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return {"wall": time.perf_counter() - begin, "cpu": used}


def rows_of(path: Path) -> list[Row]:
    """The rows of a benchmark's JSON file. Two benchmarks have tables of their own form."""
    content: Any = json.loads(path.read_text(encoding="utf-8"))
    if path.stem == "adapters":
        equal = next((entry["peak_bytes"] for entry in content["rows"] if entry["adapter"] == "lora-equal"), None)
        return [row for entry in content["rows"] if entry["adapter"] != "lora" for row in _adapter_rows(entry, equal)]
    if path.stem == "dmole":
        return [row for entry in content for row in _dmole_rows(entry)]
    return [Row(**row) for row in content["rows"]]


def _adapter_rows(entry: dict[str, Any], equal: float | None) -> list[Row]:
    """Rows of one kind of adapter; `equal` is the peak memory of plain LoRA with as many parameters as BranchLoRA."""
    rows, name = [], f"adapter layer {entry['adapter']}"
    for kind, title in (("step", "training step"), ("decode", "decode step")):
        low, high = entry[f"{kind}_spread"]
        rows.append(Row(f"{name}: {title}", "LoRA of equal rank", entry[kind], low, high, entry[f"{kind}_seconds"]))
    if equal is not None and entry["adapter"] == "branchlora":
        ratio = entry["peak_bytes"] / equal
        rows.append(
            Row(f"{name}: peak memory", "LoRA of equal trainable parameters", ratio, ratio, ratio, target="<= 1.05")
        )
    return rows


def _dmole_rows(entry: dict[str, Any]) -> list[Row]:
    samples: dict[str, list[float]] = entry["seconds"]
    base = "training step"
    return [
        ratio_row(name, base, samples, name=f"dmole: {name}, per sample", base="a sample's training step")
        for name in samples
        if name != base
    ]


def write_page(
    page: Path, rows: Mapping[str, list[Row]], took: Mapping[str, Mapping[str, float]], options: argparse.Namespace
) -> None:
    """Replace what is between the markers; `summary.json` gets the same.

    Args:
        took: seconds of each benchmark, `wall` and `cpu`.
    """
    clock = "wall-clock time" if options.wall_clock else "CPU time"
    minutes = {name: seconds / 60 for name, seconds in total(took).items()}
    lines = [BEGIN, "", f"{machine()}; {clock}. Median of the rounds' ratios (10th to 90th percentile)."]
    lines += [f"Measured in {minutes['wall']:.0f} minutes, {minutes['cpu']:.0f} of CPU time.", ""]
    lines += ["| what | relative to | ratio | to reach |", "|---|---|---:|---|"]
    for group in rows.values():
        for row in group:
            target = "" if row.met is None else f"{row.target}: {'met' if row.met else '**missed**'}"
            spread = f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})"
            lines.append(f"| {row.what} | {row.to} | {spread} | {' '.join(filter(None, (target, row.note)))} |")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(before + "\n".join([*lines, "", END]) + after, encoding="utf-8")
    summary = {
        "seconds": {**took, "together": total(took)},
        "rows": {name: [asdict(row) for row in group] for name, group in rows.items()},
    }
    (options.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
