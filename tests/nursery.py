"""The command line in processes that are forked from one which has loaded the libraries: a run that takes a second does not load
them for ten.

    with Nursery(folder) as nursery:
        started = nursery.start(["smoke", "out=..."], folder, RANK="0")

Run as a program, this is the process that forks. It has no thread of its own when it does.
"""

import importlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import TESTS, Started

LOADED = (
    "callbacks",
    "dump",
    "kill",
    "mcit_lightning.__main__",
    "mcit_lightning.commands.run",
    "mcit_lightning.runner",
    "transformers.models.clip.image_processing_pil_clip",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llava.modeling_llava",
    "transformers.models.llava.processing_llava",
)
"""What a run imports, also late."""


@dataclass
class Forked:
    """As much of `subprocess.Popen` as tests use, for a process that is not ours to wait for."""

    pid: int
    status: Path

    def poll(self) -> int | None:
        """Its exit status, a signal's number negative; None while it runs."""
        try:
            return int(self.status.read_text() or "x")
        except (FileNotFoundError, ValueError):
            return None

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def wait(self, timeout: float = float("inf")) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(0.02)
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """Starts the process that forks, and asks it for others.

    Args:
        folder: for exit statuses.
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, list[Forked]()
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
            "OMP_NUM_THREADS": "1",
        }
        self._forker = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
        )

    def start(self, arguments: list[str], folder: Path, **variables: str) -> Started:
        """The command line with `arguments`, in `folder`, in a session of its own."""
        log = tempfile.NamedTemporaryFile("w+", dir=self._folder)  # noqa: SIM115
        status = self._folder / f"{len(self._started)}.status"
        job = {
            "arguments": arguments,
            "folder": str(folder),
            "variables": variables,
            "log": log.name,
            "status": str(status),
        }
        assert self._forker.stdin is not None and self._forker.stdout is not None
        self._forker.stdin.write(json.dumps(job) + "\n")
        self._forker.stdin.flush()
        self._started.append(Forked(int(self._forker.stdout.readline()), status))
        return Started(self._started[-1], log)

    def __enter__(self) -> "Nursery":
        return self

    def __exit__(self, *_: object) -> None:
        for forked in self._started:
            forked.kill()
        self._forker.communicate()  # ends when nobody asks any more


def _live(job: dict[str, Any]) -> None:
    """The life of a forked process."""
    status = 70
    try:
        os.setsid()
        log = os.open(job["log"], os.O_WRONLY | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(job["folder"])
        os.environ.update(job["variables"])
        from mcit_lightning.__main__ import main

        try:
            status = main(job["arguments"])
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _fork_for_others() -> None:
    """A process for every line of the standard input; its number is answered, and its status written when it has ended."""
    import torch

    torch.set_num_threads(1)
    for name in LOADED:
        importlib.import_module(name)
    running: dict[int, str] = {}
    asked = True
    while asked or running:
        if asked and select.select([0], [], [], 0.02)[0]:
            line = sys.stdin.readline()
            asked = bool(line)
            if line:
                job = json.loads(line)
                if (pid := os.fork()) == 0:
                    _live(job)
                running[pid] = job["status"]
                sys.stdout.write(f"{pid}\n")
                sys.stdout.flush()
        for pid in list(running):
            found, code = os.waitpid(pid, os.WNOHANG)
            if found:
                path = Path(running.pop(pid))
                path.with_suffix(".new").write_text(str(os.waitstatus_to_exitcode(code)))
                path.with_suffix(".new").replace(path)
        if not asked:
            time.sleep(0.02)


if __name__ == "__main__":
    _fork_for_others()
    os._exit(0)  # taking all libraries down properly takes seconds
