"""Kills, signals, full disks and second runs in whole processes. Slow; `docs/robustness.md` says what they prove."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from nursery import Nursery
from processes import family
from processes import wait_for as wait_for_all
from test_distributed import TESTS, command, dumps, finish, overrides
from test_launch import of_slurm

from mcit_lightning.locks import DirectoryLock

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("devices", "workers", "kills"), [(1, 0, 30), (2, 0, 30), (1, 2, 10)])
def test_killed_again_and_again_ends_with_the_same_results(devices: int, workers: int, kills: int) -> None:
    environment = {**os.environ, "PYTHONPATH": str(TESTS.parent), "OMP_NUM_THREADS": "1"}
    arguments = ["--kills", str(kills), "--devices", str(devices), "--workers", str(workers), "--seed", "1"]
    done = subprocess.run(
        [sys.executable, str(TESTS / "kill_loop.py"), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kills} kills of {devices} process(es)" in done.stdout
    places = re.findall(r"stage_\d\d (?:start|training|evaluation)", done.stdout)
    assert len(places) >= 4, done.stdout


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not path.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)


SMALL = (
    "order=[colours,shapes]",
    "data.batch_size=2",
    "data.limit_train=16",
    "tasks.shapes.epochs=6",
    "zero_shot=false",
)


@pytest.fixture(scope="module")
def whole(smoke_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], dict[str, object]]:
    """`whole(devices)`: what an uninterrupted run ends with; loader workers do not change it."""
    found: dict[int, dict[str, object]] = {}

    def run(devices: int) -> dict[str, object]:
        if devices not in found:
            root = tmp_path_factory.mktemp("whole")
            finish(command(smoke_root, root / "run", *SMALL, f"trainer.devices={devices}"))
            found[devices] = {**dumps(root / "dump_run")}
        return found[devices]

    return run


@pytest.mark.parametrize(
    ("devices", "workers", "sent", "group"),
    [
        (1, 0, signal.SIGTERM, False),
        (2, 0, signal.SIGTERM, False),
        (2, 1, signal.SIGUSR1, True),
        (1, 2, signal.SIGTERM, True),
        (2, 2, signal.SIGTERM, True),
    ],
)
def test_a_signal_to_one_process_or_all_of_them_stops_the_run_cleanly(
    devices: int,
    workers: int,
    sent: signal.Signals,
    group: bool,
    smoke_root: Path,
    tmp_path: Path,
    whole: Callable[[int], dict[str, object]],
) -> None:
    settings = (*SMALL, f"trainer.devices={devices}", f"data.num_workers={workers}")
    process = command(smoke_root, tmp_path / "run", *settings)
    wait_for(tmp_path / "run/stage_02/last.ckpt", process)
    everyone = family(process.pid)
    os.killpg(process.pid, sent) if group else process.send_signal(sent)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 128 + sent, output
    assert f"stopped by {sent.name}; the same command continues the run" in output and "Traceback" not in output
    assert (tmp_path / "run/stage_02/last.ckpt").exists() and not (tmp_path / "run/stage_02/final.ckpt").exists()
    assert not any(alive(pid) for pid in everyone)
    assert "continues at step" in finish(command(smoke_root, tmp_path / "run", *settings))
    assert dumps(tmp_path / "dump_run") == whole(devices)


def alive(pid: int) -> bool:
    """Whether a process that somebody else has started still does anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_slurms_signal_before_the_limit_reaches_every_task(
    nursery: Nursery, smoke_root: Path, tmp_path: Path, whole: Callable[[int], dict[str, object]]
) -> None:
    """As `#SBATCH --signal=USR1@180` sends it; the batch script requeues the job for that exit status."""
    arguments = ["smoke", *overrides(smoke_root, tmp_path / "run"), *SMALL, "data.num_workers=1"]
    tasks = [nursery.start(arguments, tmp_path, **variables) for variables in of_slurm()]
    wait_for(tmp_path / "run/stage_02/last.ckpt", tasks[0].process)
    for task in tasks:
        task.process.send_signal(signal.SIGUSR1)
    for task in tasks:
        assert task.process.wait(timeout=300) == 128 + signal.SIGUSR1, task.output()
        assert "stopped by SIGUSR1" in task.output() and "Traceback" not in task.output()
    assert not list((tmp_path / "run").rglob("hpc_ckpt*"))
    wait_for_all(
        [nursery.start(arguments, tmp_path, **variables) for variables in of_slurm()], 600
    )  # the job, requeued
    assert dumps(tmp_path / "dump_run") == whole(2)


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_passes_a_signal_on(
    sent: signal.Signals, smoke_root: Path, tmp_path: Path, whole: Callable[[int], dict[str, object]]
) -> None:
    handled = ["--signals-to-handle=SIGTERM,SIGUSR1", "--shutdown-timeout=300"]
    started = command(
        smoke_root,
        tmp_path / "run",
        *SMALL,
        launch=("-m", "torch.distributed.run", "--nproc-per-node=2", *handled, "-m", "mcit_lightning"),
    )
    wait_for(tmp_path / "run/stage_02/last.ckpt", started)
    started.send_signal(sent)
    output, _ = started.communicate(timeout=300)
    assert started.returncode != 0 and f"stopped by {sent.name}; the same command continues the run" in output, output
    assert (tmp_path / "run/stage_02/last.ckpt").exists() and not (tmp_path / "run/stage_02/final.ckpt").exists()
    finish(command(smoke_root, tmp_path / "run", *SMALL, "trainer.devices=2"))  # whoever starts the processes
    assert dumps(tmp_path / "dump_run") == whole(2)


@pytest.mark.parametrize(
    "launch", [("-m", "mcit_lightning"), ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "mcit_lightning")]
)
def test_a_second_run_is_refused(launch: tuple[str, ...], smoke_root: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    lock = DirectoryLock(tmp_path / "run")
    lock.acquire()
    process = command(smoke_root, tmp_path / "run", "trainer.devices=2", launch=launch)
    output, _ = process.communicate(timeout=300)
    lock.release()
    assert process.returncode in (1, 2) and "another process is running this experiment" in output
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own that a test may fill."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("mounting needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kib", [8, 60, 200])
def test_a_full_disk_is_one_line_and_the_run_continues(kib: int, smoke_root: Path, small_disk: Path) -> None:
    resize = ["mount", "-o", f"remount,size={kib}k", str(small_disk)]
    subprocess.run(resize, check=True)
    process = command(smoke_root, small_disk / "run")
    output, _ = process.communicate(timeout=300)
    lines = [line for line in output.splitlines() if "ERROR" in line]
    assert process.returncode == 3 and len(lines) == 1 and "Traceback" not in output, output
    assert "No space left on device" in lines[0] and "the run continues" in lines[0]
    assert not list(small_disk.rglob("*.tmp"))
    subprocess.run([*resize[:2], "remount,size=20m", str(small_disk)], check=True)
    finish(command(smoke_root, small_disk / "run"))
