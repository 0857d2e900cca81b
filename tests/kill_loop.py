"""Kill a run at random until it has been killed often enough, let it finish, and compare it with an uninterrupted one.

    python tests/kill_loop.py --kills 30 --devices 2 --seed 1

The run is the smoke experiment: three stages, two of them of three epochs, a checkpoint every second step. Every life of it is a
process (on two devices: two, which talk through gloo) that ends with SIGKILL, at a random moment of its start-up, training,
saving or evaluation. Lives are forked from a process that has loaded the libraries, so that they are short. Prints where the
kills hit; exit status 0 if weights (bitwise), matrix, predictions and curves are those of the uninterrupted run.
"""

import argparse
import importlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from processes import free_port
from smoke_runs import assert_same_run, small_experiment

from mcit_lightning.smoke import prepare

EPOCHS = 3
LOADED_LATE = (
    "callbacks",
    "kill",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
)
"""What a run imports when it comes to it; here it is loaded once, for all lives."""


def start(smoke_root: Path, out: Path, devices: int, workers: int) -> list[int]:
    """Fork the processes of a life; returns their ids."""
    ids, port = [], free_port()
    for rank in range(devices):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            _live(smoke_root, out, devices, workers, rank, port)
        ids.append(child)
    return ids


def _live(smoke_root: Path, out: Path, devices: int, workers: int, rank: int, port: int) -> None:
    """Run or continue the experiment in this process, and end the process."""
    log = os.open(out.parent / f"{out.name}_rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if devices > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(devices), LOCAL_RANK=str(rank))
    import traceback

    from mcit_lightning.runner import run

    status = 1
    try:
        epochs = [f"tasks.{task}.epochs={EPOCHS}" for task in ("colours", "shapes")]
        sizes = [f"trainer.devices={devices}", "data.batch_size=2", f"data.num_workers={workers}", "zero_shot=false"]
        run(small_experiment(smoke_root, out, *epochs, *sizes))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def reap(ids: list[int]) -> int:
    """Wait for all; the first status that is not 0 (a signal's number is negative)."""
    return next((code for pid in ids if (code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))), 0)


def kill(ids: list[int]) -> None:
    """SIGKILL for every process of a life; what they have forked ends by itself."""
    for pid in ids:
        os.kill(pid, signal.SIGKILL)


def watch(out: Path, ids: list[int], limit: float, delay: float) -> tuple[bool, int]:
    """Look on until the run directory has changed `limit` times and `delay` seconds more, or a process has ended by itself.

    Returns:
        Whether one has, and how often the directory has changed.
    """
    seen, changes, end = stamps(out), 0, float("inf")
    while time.monotonic() < end:
        if any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) for pid in ids):
            return True, changes
        if end == float("inf"):
            now = stamps(out)
            changes, seen = changes + (now != seen), now
            if changes >= limit:
                end = time.monotonic() + delay
        time.sleep(0.001)
    return False, changes


def stamps(out: Path) -> list[int]:
    """When files were last made or renamed in the folders of a run."""
    folders = [out, *out.glob("stage_*"), *out.glob("predictions/*")]
    return [folder.stat().st_mtime_ns for folder in folders if folder.is_dir()]


def where(out: Path) -> str:
    """What the directory says about how far the run is."""
    try:
        state = json.loads((out / "state.json").read_text())
    except FileNotFoundError:
        return "before the first file"
    folder = out / f"stage_{len(state['steps']) + 1:02d}"
    if (folder / "final.ckpt").exists():
        return f"{folder.name} evaluation"
    return f"{folder.name} {'training' if (folder / 'last.ckpt').exists() else 'start'}"


def progress(out: Path, total: float) -> float:
    """Roughly the share of the run that is done, by the number of its files."""
    done = len([path for path in out.rglob("*") if path.suffix in (".jsonl", ".ckpt") and path.name[0] != "."])
    return min(done / total, 1.0)


def loop(smoke_root: Path, folder: Path, *, kills: int, devices: int, workers: int, seed: int) -> Counter[str]:
    """Kill a run `kills` times and compare it with an uninterrupted one.

    Returns:
        Where the kills hit, and how often.

    Raises:
        AssertionError: the results differ, or a life failed by itself.
    """
    for name in LOADED_LATE:
        importlib.import_module(name)
    draw = random.Random(seed)
    whole, out = folder / "whole", folder / "killed"
    began = time.monotonic()
    ids = start(smoke_root, whole, devices, workers)
    _, changes = watch(whole, ids, float("inf"), 0)
    assert reap(ids) == 0, (folder / "whole_rank0.log").read_text()[-3000:]
    seconds = time.monotonic() - began
    files = len(list(whole.rglob("*.jsonl"))) + 3
    hits: Counter[str] = Counter()
    while sum(hits.values()) < kills:
        left = kills - sum(hits.values())
        ids = start(smoke_root, out, devices, workers)
        ahead = changes * (1 - progress(out, files))
        limit = min(draw.expovariate(left / (left + 1.3 * ahead)), 0.7 * ahead)
        ended, _ = watch(out, ids, limit, draw.random() * seconds / changes)
        if ended:
            assert reap(ids) == 0, (folder / "killed_rank0.log").read_text()[-3000:]
            raise AssertionError(f"the run finished after {sum(hits.values())} kills; try another --seed")
        kill(ids)
        reap(ids)
        hits[where(out)] += 1
    assert reap(start(smoke_root, out, devices, workers)) == 0, (folder / "killed_rank0.log").read_text()[-3000:]
    assert_same_run(whole, out)
    return hits


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="loader processes")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kill_loop_") as folder:
        smoke_root = Path(folder) / "data"
        if (maker := os.fork()) == 0:  # so that this process has no threads when it forks again
            prepare(smoke_root)
            os._exit(0)
        assert reap([maker]) == 0
        began = time.monotonic()
        hits = loop(
            smoke_root,
            Path(folder),
            kills=options.kills,
            devices=options.devices,
            workers=options.workers,
            seed=options.seed,
        )
        seconds = time.monotonic() - began
    sys.stdout.write(
        f"{sum(hits.values())} kills of {options.devices} process(es) in {seconds:.0f} s: the same results\n"
    )
    for place, count in sorted(hits.items()):
        sys.stdout.write(f"{count:4d}  {place}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
