"""Python code on several processes of this machine, which find each other as ranks of one gloo group."""

import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
STRICT = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
"""Two ranks that are in different collectives end with an error, where they would hang or compute garbage. DDP's reducer of
torch 2.13 does not survive it on the CPU."""


@dataclass
class Started:
    """A process and the file that it writes to."""

    process: Any
    log: Any

    def output(self) -> str:
        """What it has written so far."""
        self.log.seek(0)
        return self.log.read()


def free_port() -> int:
    """A port on which nothing listens now. It is none of those from which the system takes one for every connection that is
    opened: such a one could be in use a moment later."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def start_ranks(code: str, world: int, folder: Path, **variables: str) -> list[Started]:
    """Run the same code in `world` processes, in `folder`, as Lightning starts them itself."""
    port = str(free_port())
    ranks = [
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for rank in range(world)
    ]
    return [start([sys.executable, "-c", code], folder, **own, **variables) for own in ranks]


def start(command: list[str], folder: Path, **variables: str) -> Started:
    """A process in `folder` with the tests on its path, one thread, and `variables` in its environment."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (a pipe would fill up while nobody reads)
    return Started(
        subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, text=True, cwd=folder), log
    )


def family(pid: int) -> list[int]:
    """A process and all that it and its children have started, the oldest first."""
    found = [pid]
    for parent in found:
        with suppress(FileNotFoundError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def wait_for(started: list[Started], seconds: int) -> None:
    """Wait until all have ended well; stops all, and fails with what they have written, when one has not."""
    deadline = time.monotonic() + seconds
    try:
        while any(each.process.poll() is None for each in started) and time.monotonic() < deadline:
            if any(each.process.returncode for each in started):
                time.sleep(1)  # the others say why, too
                break
            time.sleep(0.05)
    finally:
        for each in started:
            each.process.kill()
    outputs = "\n".join(f"--- process {number}\n{each.output()}" for number, each in enumerate(started))
    assert [each.process.wait() for each in started] == [0] * len(started), outputs
