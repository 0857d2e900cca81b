"""What a run costs besides training and evaluating: from the command to the first batch, and between stages.

    python benchmarks/boundaries.py

Runs three short stages on a random model, in a process of its own each round. Start-up is the time from the start of the command
to the first training batch, relative to what a process needs to import torch, transformers and Lightning; loading the model is
part of it. A boundary is the time between the last training step of a stage and the first of the next, without the evaluation,
relative to a training step.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import workload
from ratios import Row, parser, prepare, ratio_row, report

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.loading import to_yaml

IMPORTS = "import torch, transformers, lightning.pytorch"
STEPS = 6


def seconds_of(command: list[str]) -> float:
    """Wall-clock seconds of a process."""
    begin = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return time.perf_counter() - begin


def one_run(folder: Path, experiment: Path) -> dict[str, float]:
    """Seconds of start-up, of a training step and of a boundary."""
    events_file = folder / "events.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    begin = time.time()
    command = [sys.executable, "-m", "mcit_lightning", str(experiment), "overwrite=true"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    events: list[tuple[str, float]] = [(name, at) for name, at in json.loads(events_file.read_text())]
    first = [at for name, at in events if name == "first batch"]
    ends = [at for name, at in events if name == "train end"]
    tests = list(zip(_of(events, "setup test"), _of(events, "teardown test"), strict=False))
    boundaries = []
    for end, start in zip(ends, first[1:], strict=False):
        tested = sum(stop - go for go, stop in tests if end <= go and stop <= start)
        boundaries.append(start - end - tested)
    steps = [at for name, at in events if name in ("first batch", "batch")]
    durations = [after - before for before, after in pairwise(steps[1 : STEPS + 1])]
    return {
        "start-up": first[0] - begin,
        "step": statistics.median(durations),
        "boundary": statistics.median(boundaries),
    }


def _of(events: list[tuple[str, float]], name: str) -> list[float]:
    return [at for found, at in events if found == name]


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark."""
    prepare(options)
    samples: dict[str, list[float]] = {"imports": [], "start-up": [], "step": [], "boundary": []}
    with tempfile.TemporaryDirectory() as name:
        folder = workload.build(Path(name), layers=options.layers, train=8 * STEPS, test=4)
        config: ExperimentConfig = workload.experiment(folder, folder / "run", "strategy={name: sequential, rank: 16}")
        for node in config.callbacks:
            if node["_target_"] == "workload.Clock":
                node["file"] = str(folder / "events.json")
        experiment = folder / "experiment.yaml"
        experiment.write_text(to_yaml(config), encoding="utf-8")
        for _ in range(options.rounds):
            samples["imports"].append(seconds_of([sys.executable, "-c", IMPORTS]))
            for what, seconds in one_run(folder, experiment).items():
                samples[what].append(seconds)
    rows: list[Row] = [
        ratio_row("start-up", "imports", samples, name="command to first batch", base="importing the libraries"),
        ratio_row("boundary", "step", samples, name="between two stages", base="a training step"),
    ]
    report(f"start-up and stage boundaries, {options.layers} decoder layers", rows, options)


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--layers", type=int, default=10, help="of the decoder; SmolLM2-135M has 30")
    measure(arguments.parse_args())
