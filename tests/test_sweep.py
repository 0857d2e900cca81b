"""Running a sweep: what is kept, continued, reported and stopped. Cells are small scripts here; the last test runs real ones."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from mcit_lightning.__main__ import main
from mcit_lightning.comparison.find import find_runs
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import to_yaml
from mcit_lightning.sweep.execute import execute
from mcit_lightning.sweep.plan import PLAN_FILE, Cell, SweepPlan, SweepRun

FINISH = (
    "import json, os, pathlib, sys, time\nroot = pathlib.Path(sys.argv[1])\nroot.mkdir(parents=True, exist_ok=True)\n"
    "(root / 'config.yaml').write_text(sys.argv[2])\n"
    "(root / 'seen').write_text(os.environ.get('OMP_NUM_THREADS', '') + ' ' + os.environ.get('CUDA_VISIBLE_DEVICES', ''))\n"
)
"""A run that writes what a finished one has, as far as a sweep looks."""
STATE = "(root / 'state.json').write_text(json.dumps({'finished': %s}))\n"


def script(body: str) -> Callable[[Cell], list[str]]:
    return lambda cell: [sys.executable, "-c", FINISH + body, str(cell.folder), to_yaml(cell.config())]


def make_cells(out: Path, **runs: SweepRun) -> list[Cell]:
    return SweepPlan(runs or {"a": SweepRun("smoke")}, seeds=[0, 1]).cells(out)


def test_finished_cells_are_kept_and_others_run(tmp_path: Path) -> None:
    cells = make_cells(tmp_path)
    first = execute(cells[:1], command=script(STATE % "True"))
    assert [outcome.status for outcome in first] == ["finished"] and first[0].seconds > 0
    both = execute(cells, command=script("print('again')\n" + STATE % "True"))
    assert [outcome.status for outcome in both] == ["kept", "finished"]
    assert not cells[0].log.read_text() and cells[1].log.read_text() == "again\n"


def test_failures_do_not_stop_the_others_and_say_why(tmp_path: Path) -> None:
    cells = make_cells(tmp_path)
    body = "if 'seed0' in str(root):\n    print('first')\n    sys.exit('out of memory')\n" + STATE % "True"
    outcomes = execute(cells, command=script(body))
    assert [outcome.status for outcome in outcomes] == ["failed", "finished"]
    assert outcomes[0].why == "ended with status 1: out of memory"
    killed = execute(cells[:1], command=script("os.kill(os.getpid(), 9)"))
    assert killed[0].why.startswith("was killed by signal SIGKILL")
    assert "out of memory" in cells[0].log.read_text(), "the log is added to"


def test_a_process_that_ends_well_without_finishing_has_failed(tmp_path: Path) -> None:
    (outcome,) = execute(make_cells(tmp_path)[:1], command=script(STATE % "False"))
    assert outcome.status == "failed" and "ended with status 0" in outcome.why


def test_a_finished_cell_of_other_settings_is_no_silent_success(tmp_path: Path) -> None:
    old = make_cells(tmp_path, a=SweepRun("smoke"))[:1]
    execute(old, command=script(STATE % "True"))
    machine = make_cells(tmp_path, a=SweepRun("smoke", ("trainer.devices=1", "data.num_workers=1")))[:1]
    assert execute(machine, command=script("sys.exit(1)"))[0].status == "kept", "where it runs may change"
    new = make_cells(tmp_path, a=SweepRun("smoke", ("strategy.rank=2", "optim.lr=0.5")))[:1]
    (outcome,) = execute(new, command=script("sys.exit(1)"))
    assert outcome.status == "failed" and "optim.lr: 0.01 -> 0.5; strategy.rank: 4 -> 2" in outcome.why
    assert "out=DIR" in outcome.why and not new[0].log.read_text(), "it was not started"


def test_a_cell_of_another_process_is_left_to_it(tmp_path: Path) -> None:
    (cell, *_) = make_cells(tmp_path)
    cell.folder.mkdir(parents=True)
    with (cell.folder / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert execute([cell], command=script(STATE % "True"))[0].status == "busy"
    assert execute([cell], command=script(STATE % "True"))[0].status == "finished"


def test_jobs_run_at_once_and_share_out_the_gpus(tmp_path: Path) -> None:
    """Each waits for the other's mark: one after another they would fail."""
    cells = make_cells(tmp_path)
    body = (
        "(root.parent / f'mark_{root.name}').touch()\nuntil = time.monotonic() + 20\n"
        "while len(list(root.parent.glob('mark_*'))) < 2 and time.monotonic() < until:\n    time.sleep(0.01)\n"
        "assert time.monotonic() < until\n" + STATE % "True"
    )
    outcomes = execute(cells, jobs=2, threads=3, gpus=["0", "1", "4", "5"], command=script(body))
    assert [outcome.status for outcome in outcomes] == ["finished", "finished"]
    assert sorted((cell.folder / "seen").read_text() for cell in cells) == ["3 0,1", "3 4,5"]


def test_an_interrupted_sweep_stops_its_cells(tmp_path: Path) -> None:
    """The process group of the cell is gone when `execute` has raised."""
    (cell, *_) = make_cells(tmp_path)
    body = (
        "(root / 'pid').write_text(str(os.getpid()))\nos.kill(int(os.environ['SWEEP']), 15)\n"
        "time.sleep(60)\n" + STATE % "True"
    )
    os.environ["SWEEP"] = str(os.getpid())
    try:
        with pytest.raises(SystemExit) as stop:
            execute([cell], command=script(body))
    finally:
        del os.environ["SWEEP"]
    assert stop.value.code == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((cell.folder / "pid").read_text()), 0)


def test_the_plan_in_the_folder_grows_and_refuses_other_orders(tmp_path: Path) -> None:
    SweepPlan({"a": SweepRun("smoke")}, seeds=[0, 1]).save(tmp_path)
    SweepPlan({"b": SweepRun("dmole_smoke", ("strategy.rank=2",))}, seeds=[2], orders=2).save(tmp_path)
    content = yaml.safe_load((tmp_path / PLAN_FILE).read_text())
    assert list(content["runs"]) == ["a", "b"] and content["seeds"] == [0, 1, 2]
    assert len(content["runs"]["a"]["orders"]) == 1 and len(content["runs"]["b"]["orders"]) == 2
    SweepPlan({"a": SweepRun("smoke")}, orders=3).save(tmp_path)
    with pytest.raises(ValueError, match=r"order 1 of run 'a' is \['colours', 'shapes', 'counts'\] there"):
        SweepPlan({"a": SweepRun("smoke")}, orders=[["shapes", "colours"]]).save(tmp_path)


@pytest.mark.slow
def test_a_real_sweep_is_killed_and_completed(tmp_path: Path) -> None:
    """SIGKILL to the sweep and its cell in the middle of the second one; then the same command; then once more."""
    out = tmp_path / "sweep"
    small = ["data.limit_train=8", "data.limit_test=4", "zero_shot=false", f"out={out}", "seeds=0,1"]
    arguments = ["smoke", "strategies=sequential,branchlora", *small, "--threads", "1"]
    command = [sys.executable, "-m", "mcit_lightning", "sweep", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    second = out / "branchlora/seed0"
    deadline = time.monotonic() + 480
    while not (second / "stage_01/final.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    listing = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout
    children = [int(line.split()[0]) for line in listing.splitlines()[1:] if line.split()[1] == str(process.pid)]
    for pid in (process.pid, *children):
        os.kill(pid, signal.SIGKILL)
    process.wait()
    assert json.loads((out / "sequential/seed0/state.json").read_text())["finished"]
    assert not json.loads((second / "state.json").read_text())["finished"]
    stamps = [(path, path.stat().st_mtime_ns) for path in (out / "sequential/seed0").rglob("*") if path.is_file()]
    done = (second / "stage_01/final.ckpt").stat().st_mtime_ns
    assert main(["sweep", *arguments]) == 0
    assert [(path, path.stat().st_mtime_ns) for path, _ in stamps] == stamps, "a finished cell is not touched"
    assert (second / "stage_01/final.ckpt").stat().st_mtime_ns == done, "a trained stage is not trained again"
    runs, left_out = find_runs([out])
    assert [run.name for run in runs] == ["sequential"] * 2 + ["branchlora"] * 2 and not left_out
    assert "Leaderboard" in (out / "comparison.html").read_text()
    alone = tmp_path / "alone"
    assert main(["branchlora_smoke", *small[:3], f"out={alone}", "seed=0", "trainer.enable_progress_bar=false"]) == 0
    assert Results.load(alone).matrix.to_dict() == Results.load(second).matrix.to_dict()
    assert main(["sweep", *arguments, "branchlora:strategy.rank=0"]) == 2
