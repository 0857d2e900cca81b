"""Python code on several processes of this machine, which find each other as ranks of one gloo group."""

import os
import socket
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
STRICT = {"TORCH_DISTRIBUTED_DEBUG": "DETAIL"}
"""Two ranks that are in different collectives end with an error, where they would hang or compute garbage. DDP's reducer of
torch 2.13 does not survive it on the CPU."""


def free_port() -> int:
    """A port on which nothing listens now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with the tests on the path, one thread, and `variables`."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}


def start_ranks(code: str, world: int, folder: Path, **variables: str) -> list[subprocess.Popen[str]]:
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


def start(command: list[str], folder: Path, **variables: str) -> subprocess.Popen[str]:
    """A process whose whole output can be read when it has ended."""
    return subprocess.Popen(
        command,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def wait_for(processes: list[subprocess.Popen[str]], seconds: int) -> list[str]:
    """What each has written; fails, and stops all, if one does not end well in time."""
    try:
        outputs = []
        for process in processes:
            output, _ = process.communicate(timeout=seconds)
            assert process.returncode == 0, output
            outputs.append(output)
        return outputs
    finally:
        for process in processes:
            process.kill()
