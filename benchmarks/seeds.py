"""Several strategies over several seeds on one stream: mean and standard deviation of the continual metrics.

    python benchmarks/seeds.py benchmarks/small_stream.yaml --seeds 0 1 2 3 4 --jobs 2 --out runs/small_stream

Every cell (run, seed) is a run directory of its own below `--out`, started as a process; a cell that is finished is not run
again and one that was interrupted continues, so the same command completes the table. Prints it, and writes it as `summary.json`
and `summary.md` beside the runs. `--jobs` runs that many cells at once, each with `--threads` threads.
"""

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mcit_lightning.evaluation.results import Results

METRICS = ("MFT", "MFN", "MAA", "BWT", "AVG")

log = logging.getLogger(__name__)


def run_cell(entry: dict[str, Any], common: list[str], folder: Path, seed: int, threads: int) -> None:
    """Run one cell in a process of its own, unless it is finished; its output goes to `log.txt` beside the results."""
    state = folder / "state.json"
    if state.is_file() and json.loads(state.read_text())["finished"]:
        return
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [*common, *entry.get("overrides", []), f"seed={seed}", f"out={folder}"]
    command = [sys.executable, "-m", "mcit_lightning", entry["experiment"], *overrides]
    command.append("trainer.enable_progress_bar=false")
    log.info("start %s", folder)
    with (folder.parent / f"{folder.name}.log").open("w", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        code = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    log.info("%s %s", "done" if code == 0 else f"FAILED with code {code}:", folder)


def collect(out: Path, names: list[str], seeds: list[int]) -> dict[str, dict[str, Any]]:
    """Run -> metric -> values of the finished seeds, with trainable parameters of the last stage and the router's accuracy."""
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        rows: dict[str, Any] = {key: [] for key in (*METRICS, "router")}
        rows["seeds"] = []
        for seed in seeds:
            folder = out / name / f"seed{seed}"
            state = folder / "state.json"
            if not (state.is_file() and json.loads(state.read_text())["finished"]):
                continue
            results = Results.load(folder)
            rows["seeds"].append(seed)
            for key in METRICS:
                rows[key].append(results.summary[key])
            rows["router"].append((results.routing or {}).get("accuracy"))
            rows["trainable"] = results.cost[-1].trainable_params if results.cost else 0
        table[name] = rows
    return table


def spread(values: list[float | None]) -> str:
    """`mean ± standard deviation` with one decimal; a dash where nothing is defined."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    deviation = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{deviation}".replace("-", "−")


def markdown(table: dict[str, dict[str, Any]]) -> str:
    """The table as Markdown."""
    head = ["run", "seeds", *METRICS, "router %", "trainable"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in table.items():
        cells = [name, str(len(rows["seeds"])), *(spread(rows[key]) for key in METRICS), spread(rows["router"])]
        cells.append(f"{rows['trainable'] / 1e6:.2f} M" if rows.get("trainable") else "–")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "plan", type=Path, help="YAML with `common` overrides and `runs`: name -> experiment, overrides"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", nargs="*", default=None, help="names of the runs to do; all are tabulated")
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 1)))
    parser.add_argument("--table", action="store_true", help="only tabulate what is there")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    plan: Any = OmegaConf.to_container(OmegaConf.load(options.plan))
    names = list(plan["runs"])
    if not options.table:
        chosen = options.only or names
        cells = [(name, seed) for seed in options.seeds for name in chosen]
        with ThreadPoolExecutor(options.jobs) as pool:
            for name, seed in cells:
                folder = (options.out / name / f"seed{seed}").resolve()
                pool.submit(run_cell, plan["runs"][name], plan["common"], folder, seed, options.threads)
    table = collect(options.out, names, options.seeds)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "summary.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    (options.out / "summary.md").write_text(markdown(table), encoding="utf-8")
    sys.stdout.write(markdown(table))


if __name__ == "__main__":
    main()
