"""What a run costs besides training and evaluating: from the command to the first step, and between two stages.

    python benchmarks/boundaries.py
    python benchmarks/boundaries.py --cpu-time --threads 1     # on a machine that is busy with other work

Each round is a run of three tasks with a step each, and a script without any framework (`bare_start.py`), in a process of its
own. Both import the same libraries, load the same model in float32 and take the same first step. Start-up is what passes from the
start of the process to the end of its first training step. A boundary is what passes from the end of a stage's last step to the
first batch of the next, without the evaluation: checkpoint, teardown, a new Trainer, loaders. Published code bases load the model
anew there, most of them in a new process.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import workload
from ratios import Row, parser, prepare, ratio_row, report

from mcit_lightning.loading import to_yaml

HERE = Path(__file__).resolve().parent
RANK = 16


def run_child(command: list[str], options: argparse.Namespace) -> tuple[float, str]:
    """Run a command; when it began on the clock that its own times are of, and what it wrote."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    if options.threads:
        environment["OMP_NUM_THREADS"] = str(options.threads)
    begin = 0.0 if options.cpu_time else time.time()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return begin, done.stdout


def framework(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of a run's start-up and of its boundaries (the median)."""
    begin, _ = run_child(["-m", "mcit_lightning", str(folder / "experiment.yaml"), "overwrite=true"], options)
    events: list[tuple[str, float]] = [(name, at) for name, at in json.loads((folder / "events.json").read_text())]
    start_up = next(at for name, at in events if name == "batch") - begin
    boundaries = between_stages(events)
    assert len(boundaries) == len(workload.TASKS) - 1
    return {"start-up": start_up, "boundary": statistics.median(boundaries)}


def between_stages(events: Sequence[tuple[str, float]]) -> list[float]:
    """Seconds from each stage's last step to the next one's first batch, without the evaluation.

    Args:
        events: what `workload.Clock` noted.
    """
    boundaries, since, tested = [], 0.0, 0.0
    for name, at in events:
        if name == "batch":
            since, tested = at, 0.0
        elif name in ("setup test", "teardown test"):
            tested += at if name == "teardown test" else -at
        elif name == "first batch" and since:
            boundaries.append(at - since - tested)
    return boundaries


def bare(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Seconds of the script: to its first step, of loading the model, and of imports and loading together."""
    flags = ["--rank", str(RANK), *(["--cpu-time"] if options.cpu_time else [])]
    begin, output = run_child([str(HERE / "bare_start.py"), str(folder), *flags], options)
    at: dict[str, float] = json.loads(output.splitlines()[-1])
    return {
        "script": at["stepped"] - begin,
        "load": at["loaded"] - at["imported"],
        "process": at["loaded"] - begin,
    }


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark."""
    prepare(options)
    samples: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = workload.build(Path(name), layers=options.layers, train=8, test=2)
        strategy = f"strategy={{name: sequential, rank: {RANK}, alpha: {2 * RANK}}}"
        unvalidated = [f"tasks.{task}.val=null" for task in workload.TASKS]  # evaluation is measured elsewhere
        config = workload.experiment(folder, folder / "run", strategy, "trainer.precision=32-true", *unvalidated)
        for node in config.callbacks:
            if node["_target_"] == "workload.Clock":
                node |= {"file": str(folder / "events.json"), "cpu_time": options.cpu_time}
        (folder / "experiment.yaml").write_text(to_yaml(config), encoding="utf-8")
        for number in range(options.rounds):
            parts = [framework, bare] if number % 2 == 0 else [bare, framework]
            for part in parts:
                for what, seconds in part(folder, options).items():
                    samples.setdefault(what, []).append(seconds)
    rows: list[Row] = [
        ratio_row("start-up", "script", samples, name="command to first step", base="bare script to first step"),
        ratio_row("boundary", "load", samples, name="between two stages", base="loading model and processor anew"),
        ratio_row("boundary", "process", samples, name="between two stages", base="a new process that loads them"),
    ]
    report(f"start-up and stage boundaries, {options.layers} decoder layers, batch 8", rows, options)


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=5)
    arguments.add_argument("--layers", type=int, default=10, help="of the decoder; SmolLM2-135M has 30")
    measure(arguments.parse_args())
