"""Running the cells of a sweep: each as a process of its own, one after another or several at once."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Literal

from mcit_lightning.sweep.plan import Cell
from mcit_lightning.sweep.state import status

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2
GRACE_SECONDS = 30.0
"""How long a stopped cell has to end by itself."""


@dataclass(frozen=True)
class Outcome:
    """What became of a cell.

    Args:
        cell: which one.
        status: `kept` was finished before; `busy` is being run by another process.
        seconds: how long its process ran here.
        why: of a failure, the last line of its log or the error.
    """

    cell: Cell
    status: Literal["finished", "kept", "failed", "busy"]
    seconds: float = 0.0
    why: str = ""


@dataclass
class _Running:
    cell: Cell
    slot: int
    process: subprocess.Popen[bytes]
    since: float


def run_command(cell: Cell) -> list[str]:
    """The command line of a cell's process."""
    command = [sys.executable, "-m", "mcit_lightning", cell.experiment, *cell.overrides, f"out={cell.folder}"]
    return [*command, "trainer.enable_progress_bar=false"]


def execute(
    cells: Sequence[Cell],
    *,
    jobs: int = 1,
    threads: int | None = None,
    gpus: Sequence[str] = (),
    command: Callable[[Cell], list[str]] = run_command,
) -> list[Outcome]:
    """Run every cell that is not finished; a failure does not stop the others.

    If this process is interrupted or terminated, so are the cells that run; the next call continues them.

    Args:
        cells: what to run, in this order.
        jobs: how many at once.
        threads: CPU threads of each; None leaves that to torch.
        gpus: devices to share out among the jobs (`CUDA_VISIBLE_DEVICES`); none leaves all to each.
        command: from a cell to the command line that runs it.

    Returns:
        An outcome per cell, in the order of `cells`.
    """
    outcomes: dict[Cell, Outcome] = {}
    waiting: list[Cell] = []
    for cell in cells:
        try:
            found = status(cell)
        except (ValueError, OSError) as error:
            outcomes[cell] = Outcome(cell, "failed", why=str(error))
            continue
        if found in ("finished", "busy"):
            outcomes[cell] = Outcome(cell, "kept" if found == "finished" else "busy")
        else:
            waiting.append(cell)
    kept = sum(outcome.status == "kept" for outcome in outcomes.values())
    logger.info("%d cells: %d finished before, %d to run", len(cells), kept, len(waiting))
    total, running = len(waiting), list[_Running]()
    with _terminated_as_exit():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    slot = min(set(range(jobs)) - {entry.slot for entry in running})
                    cell = waiting.pop(0)
                    running.append(_start(cell, slot, command(cell), _environment(slot, jobs, threads, gpus)))
                time.sleep(POLL_SECONDS)
                for entry in [entry for entry in running if entry.process.poll() is not None]:
                    running.remove(entry)
                    outcome = outcomes[entry.cell] = _outcome(entry)
                    done = total - len(waiting) - len(running)
                    logger.info("%s %s (%d of %d)", outcome.status, entry.cell.folder, done, total)
        finally:
            _stop(running)
    return [outcomes[cell] for cell in cells]


def _start(cell: Cell, slot: int, command: list[str], environment: dict[str, str]) -> _Running:
    """Start a cell in a session of its own, so that Ctrl-C reaches this process alone; the log is appended to."""
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("start %s", cell.folder)
    with cell.log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    return _Running(cell, slot, process, time.monotonic())


def _environment(slot: int, jobs: int, threads: int | None, gpus: Sequence[str]) -> dict[str, str]:
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    if gpus:
        share = len(gpus) // jobs
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[slot * share : (slot + 1) * share])
    return environment


def _outcome(entry: _Running) -> Outcome:
    seconds = time.monotonic() - entry.since
    code = entry.process.returncode
    try:
        finished = status(entry.cell) == "finished"
    except (ValueError, OSError) as error:
        return Outcome(entry.cell, "failed", seconds, str(error))
    if code == 0 and finished:
        return Outcome(entry.cell, "finished", seconds)
    how = f"ended with status {code}" if code >= 0 else f"was killed by signal {signal.Signals(-code).name}"
    last = _last_line(entry.cell)
    return Outcome(entry.cell, "failed", seconds, f"{how}{': ' if last else ''}{last}")


def _last_line(cell: Cell) -> str:
    lines = cell.log.read_bytes()[-4000:].decode("utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else ""


def _stop(running: Sequence[_Running]) -> None:
    """End what still runs, with what it has started itself."""
    for entry in running:
        _signal(entry, signal.SIGTERM)
    deadline = time.monotonic() + GRACE_SECONDS
    for entry in running:
        try:
            entry.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal(entry, signal.SIGKILL)
            entry.process.wait()
        logger.warning("stopped %s; the same command continues it", entry.cell.folder)


def _signal(entry: _Running, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(entry.process.pid, number)


@contextmanager
def _terminated_as_exit() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that the cells are ended too."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
