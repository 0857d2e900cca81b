"""Two gloo processes on the CPU stand in for two GPUs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
TASKS = ("colours", "shapes", "counts")
CALLBACKS = (
    "callbacks=[{{_target_: callbacks.Consolidate}}, {{_target_: callbacks.StageCost}}, {{_target_: callbacks.BackwardTransfer}},"
    " {{_target_: dump.DumpRank, folder: {folder}}}, {{_target_: callbacks.StageCheckpoint, every_n_steps: 2}}]"
)


def overrides(smoke_root: Path, out: Path) -> list[str]:
    """What makes the smoke experiment small, and its ranks write down what they hold beside the run directory."""
    return [
        f"data.root={smoke_root}",
        "prepare=null",
        f"out={out}",
        "data.eval_batch_size=2",
        "data.limit_test=7",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        CALLBACKS.format(folder=out.parent / f"dump_{out.name}"),
    ]


def command(
    smoke_root: Path, out: Path, *more: str, launch: tuple[str, ...] = ("-m", "mcit_lightning")
) -> subprocess.Popen[str]:
    """Start the command line on the smoke experiment, in a process group of its own."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": "1",
        "MCIT_CACHE": str(smoke_root.parent / "cache"),
    }
    return subprocess.Popen(
        [sys.executable, *launch, "smoke", *overrides(smoke_root, out), *more],
        start_new_session=True,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=out.parent,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def dumps(folder: Path) -> dict[str, dict[int, object]]:
    """What was dumped -> rank -> content."""
    found: dict[str, dict[int, object]] = {}
    for path in sorted(folder.glob("rank*.json")):
        rank, _, name = path.stem.partition("_")
        found.setdefault(name, {})[int(rank.removeprefix("rank"))] = json.loads(path.read_text())
    return found


def test_two_processes_agree_and_evaluate_every_sample_once(smoke_root: Path, tmp_path: Path) -> None:
    finish(command(smoke_root, tmp_path / "run", "trainer.devices=2", "data.batch_size=2", "data.limit_train=13"))
    found = dumps(tmp_path / "dump_run")
    for stage in TASKS:
        assert set(found[stage]) == {0, 1}
        assert found[stage][0] == found[stage][1], stage
    # seven rows do not divide by two ranks: no row is evaluated twice, none is left out
    assert found["test_stage_03"] == {0: dict.fromkeys(TASKS, 4.0), 1: dict.fromkeys(TASKS, 3.0)}
    for task in TASKS:
        lines = (tmp_path / "run/predictions/stage_03" / f"{task}.jsonl").read_text().splitlines()
        assert len({json.loads(line)["question_id"] for line in lines}) == len(lines) == 7


@pytest.mark.slow
def test_two_processes_killed_and_resumed(smoke_root: Path, tmp_path: Path) -> None:
    settings = ("trainer.devices=2", "data.batch_size=2", "data.limit_train=12")
    finish(command(smoke_root, tmp_path / "whole", *settings))
    process = command(smoke_root, tmp_path / "run", *settings)
    deadline = time.monotonic() + 200
    while not (tmp_path / "run/stage_02/last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    for child in _children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()
    finish(command(smoke_root, tmp_path / "run", *settings))
    assert dumps(tmp_path / "dump_whole") == dumps(tmp_path / "dump_run")


@pytest.mark.slow
def test_killed_by_sigkill_in_one_process(smoke_root: Path, tmp_path: Path) -> None:
    finish(command(smoke_root, tmp_path / "whole", "trainer.devices=1"))
    process = command(smoke_root, tmp_path / "run", "trainer.devices=1")
    while not (tmp_path / "run/stage_02").exists() and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    process.communicate()
    output = finish(command(smoke_root, tmp_path / "run", "trainer.devices=1"))
    assert "restored from" in output or "continues" in output
    assert dumps(tmp_path / "dump_whole") == dumps(tmp_path / "dump_run")
    again = command(smoke_root, tmp_path / "run", "trainer.devices=1")
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 2 and "finished" in output and "Traceback" not in output


def _children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_two_processes_killed_in_an_evaluation_keep_its_finished_tasks(smoke_root: Path, tmp_path: Path) -> None:
    settings = ("trainer.devices=2", "data.batch_size=2", "data.limit_train=8", "data.eval_batch_size=1")
    finish(command(smoke_root, tmp_path / "whole", *settings))
    process = command(smoke_root, tmp_path / "run", *settings)
    parts = [tmp_path / f"run/predictions/stage_03/.shapes.rank{rank}.part" for rank in range(2)]
    deadline = time.monotonic() + 200
    while not all(part.exists() for part in parts) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    for child in _children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.kill()
    process.communicate()
    output = finish(command(smoke_root, tmp_path / "run", *settings))
    assert "stage_03: evaluated before the interruption: colours, shapes" in output
    whole, run = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "run"))
    assert run["matrix"] == whole["matrix"] and run["cost"][2]["eval_seconds"] > 0
    ids = {name: json.loads((tmp_path / name / "state.json").read_text())["run_id"] for name in ("whole", "run")}
    for name in TASKS:  # equal but for the run that an answer names
        answers = {
            run: (tmp_path / run / f"predictions/stage_03/{name}.jsonl").read_text().replace(own, "")
            for run, own in ids.items()
        }
        assert answers["run"] == answers["whole"]
    assert not list((tmp_path / "run/predictions").glob("*/.*"))
