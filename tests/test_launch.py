"""Processes that torchrun or SLURM starts: how they are counted, what is refused, and who opens the run directory first."""

import itertools
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from fuzz import content_of
from lightning.pytorch.plugins.environments import SLURMEnvironment, TorchElasticEnvironment
from nursery import Nursery
from processes import Started, free_port, start, wait_for
from smoke_runs import adapters, predictions

from mcit_lightning import launch
from mcit_lightning.engine import engine_arguments, planned_devices
from mcit_lightning.launch import check_launch, cluster_plugins, launched_processes, launcher, rank_zero_first

Variables = Callable[[], list[dict[str, str]]]
Two = Callable[[Variables, list[str], Path], list[Started]]
PATIENCE = 600
"""Seconds that two processes may take for a small run on a busy machine."""
SLURM = {
    "SLURM_NTASKS": "8",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_NNODES": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "4711",
    "SLURM_JOB_NAME": "mcit",
    "SLURM_NODELIST": "node[07-08]",
}
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "WORLD_SIZE": "6",
    "LOCAL_WORLD_SIZE": "2",
    "RANK": "3",
    "LOCAL_RANK": "1",
    "GROUP_RANK": "1",
}


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_lightning_starts_the_processes_where_nobody_else_has(monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher() is None and launched_processes() is None
    assert set(engine_arguments({"devices": 2}, find_unused=False)) == {"strategy"}
    set_all(monkeypatch, {**SLURM, "SLURM_JOB_NAME": "interactive"})
    assert launcher() is None and launched_processes() is None
    check_launch({"devices": 4})


def test_slurm_says_how_many_processes_there_are_and_requeues_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, SLURM)
    cluster = launcher()
    assert isinstance(cluster, SLURMEnvironment) and not cluster.auto_requeue
    assert (cluster.global_rank(), cluster.world_size(), cluster.main_address) == (5, 8, "node07")
    assert launched_processes() == (4, 2) and planned_devices({}) == 8
    arguments = engine_arguments({"accelerator": "gpu"}, find_unused=False)
    assert (arguments["devices"], arguments["num_nodes"]) == (4, 2)
    (plugin,) = cluster_plugins()
    assert isinstance(plugin, SLURMEnvironment) and not plugin.auto_requeue
    check_launch({})
    check_launch({"devices": 4, "num_nodes": 2})


def test_torchrun_says_how_many_processes_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, TORCHRUN)
    assert isinstance(launcher(), TorchElasticEnvironment)
    assert launched_processes() == (2, 3) and planned_devices({"devices": "auto"}) == 6
    arguments = engine_arguments({"accelerator": "cpu", "strategy": "fsdp2"}, find_unused=False)
    assert (arguments["devices"], arguments["num_nodes"]) == (2, 3) and not cluster_plugins()
    assert arguments["inference_mode"] is False


@pytest.mark.parametrize(
    ("variables", "trainer", "message"),
    [
        ({}, {"num_nodes": 2}, r"trainer\.num_nodes: is 2.*torchrun.*srun"),
        (TORCHRUN, {"devices": 4}, r"ask for 4 process.*3 node.*torchrun has started 2 on 3"),
        (TORCHRUN, {"devices": [0, 1], "num_nodes": 2}, r"ask for 2 process.*on 2 node.*started 2 on 3"),
        (SLURM, {"devices": 1}, r"ask for 1 process.*SLURM has started 4 on 2.*Leave both keys out"),
    ],
)
def test_other_processes_than_asked_for_are_refused(
    variables: dict[str, str], trainer: dict[str, object], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_all(monkeypatch, variables)
    with pytest.raises(ValueError, match=message):
        check_launch(trainer)


def test_slurm_tasks_without_a_number_per_node_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {name: value for name, value in SLURM.items() if name != "SLURM_NTASKS_PER_NODE"})
    with pytest.raises(ValueError, match=r"SLURM.*--ntasks-per-node"):
        launcher()


@dataclass
class Rank:
    """As much of a cluster environment as is asked for."""

    rank: int
    main_address: str = "127.0.0.1"
    main_port: int = 0

    def global_rank(self) -> int:
        return self.rank

    def world_size(self) -> int:
        return 2


@pytest.mark.parametrize("fails", [False, True])
def test_rank_zero_goes_first_and_says_if_it_has_failed(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here, store = threading.local(), torch.distributed.HashStore()
    entered, said = list[int](), dict[int, str]()
    monkeypatch.setattr(launch, "launcher", lambda: Rank(here.rank))
    monkeypatch.setattr(launch, "_store", lambda *_: store)
    monkeypatch.setattr(launch, "_turns", itertools.repeat(0))

    def enter(rank: int) -> None:
        here.rank = rank
        try:
            with rank_zero_first():
                entered.append(rank)
                if fails:
                    raise OSError("disk full")
        except (OSError, ValueError) as error:
            said[rank] = str(error)

    other = threading.Thread(target=enter, args=(1,))
    other.start()
    other.join(0.2)
    assert not entered and not said and other.is_alive()
    enter(0)
    other.join(20)
    assert entered == ([0] if fails else [0, 1])
    assert said == ({0: "disk full", 1: "rank zero could not start; see its message"} if fails else {})


def settings(smoke_root: Path, out: Path, *more: str) -> list[str]:
    return [
        "smoke",
        f"data.root={smoke_root}",
        "prepare=null",
        f"out={out}",
        "order=[colours]",
        "data.batch_size=2",
        "data.limit_train=13",
        "data.limit_test=5",
        "zero_shot=false",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        *more,
    ]


def steps(run: Path) -> list[int]:
    state = json.loads((run / "state.json").read_text())
    assert state["finished"]
    found: list[int] = state["steps"]
    return found


def of_slurm() -> list[dict[str, str]]:
    """The variables of two nodes with a task each, on this machine."""
    port = str(free_port())
    own = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "localhost", "MASTER_PORT": port}
    return [
        {**SLURM, **own, "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_PROCID": str(rank)} for rank in (0, 1)
    ]


def of_torchrun() -> list[dict[str, str]]:
    """The variables of two processes of a machine."""
    own = {"LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2", "GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    port = str(free_port())
    return [{**TORCHRUN, **own, "MASTER_PORT": port, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (0, 1)]


@pytest.fixture(scope="module")
def two(nursery: Nursery) -> Two:
    """`two(of_slurm, arguments, folder)`: the command line in two processes with such variables."""
    return lambda variables, arguments, folder: [nursery.start(arguments, folder, **own) for own in variables()]


LAUNCHERS = pytest.mark.parametrize("launched", [of_torchrun, of_slurm])


@pytest.fixture(scope="module")
def whole(two: Two, smoke_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing has disturbed."""
    root = tmp_path_factory.mktemp("whole")
    wait_for(two(of_torchrun, settings(smoke_root, root / "run"), root), PATIENCE)
    assert steps(root / "run") == [4]  # 13 samples on two ranks: 7 each, in batches of two
    return root / "run"


def assert_alike(whole: Path, run: Path) -> None:
    """The same steps, weights to the last bit, and answers."""
    assert steps(run) == steps(whole)
    left, right = adapters(whole), adapters(run)
    assert left.keys() == right.keys()
    for stage, weights in left.items():
        for name, value in weights.items():
            assert torch.equal(value, right[stage][name]), (stage, name)
    rows = [
        [{**json.loads(line), "answer_id": ""} for line in text.splitlines()]
        for root in (whole, run)
        for text in predictions(root).values()
    ]
    assert rows[: len(rows) // 2] == rows[len(rows) // 2 :] and len(rows[0]) == 5


@pytest.mark.slow
@LAUNCHERS
def test_a_run_is_started_over_also_if_rank_zero_is_last(
    launched: Variables, two: Two, whole: Path, smoke_root: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    again = two(launched, settings(smoke_root, tmp_path / "run"), tmp_path)
    assert all(each.process.wait(timeout=PATIENCE) != 0 for each in again)
    said = "".join(each.output() for each in again)
    assert said.count("the run is finished") == 1 and "rank zero could not start" in said and "Traceback" not in said
    # of another configuration, finished, and rank one looks at it before rank zero has deleted it
    over = settings(smoke_root, tmp_path / "run", "overwrite=true", "imports=[late]")
    wait_for(two(launched, over, tmp_path), PATIENCE)
    assert_alike(whole, tmp_path / "run")


@pytest.mark.slow
@LAUNCHERS
def test_a_second_run_is_refused_and_the_first_goes_on(
    launched: Variables, two: Two, whole: Path, smoke_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = two(of_torchrun, settings(smoke_root, out), tmp_path)
    deadline = time.monotonic() + PATIENCE
    while not (out / "stage_01").exists() and first[0].process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert first[0].process.poll() is None, first[0].output()
    for each in first:
        each.process.send_signal(signal.SIGSTOP)  # so that it cannot end before the second has come
    before = content_of(out)
    for more in ([], ["overwrite=true"], ["overwrite=true", "optim.lr=0.5"]):
        second = two(launched, settings(smoke_root, out, *more), tmp_path)
        assert [each.process.wait(timeout=PATIENCE) for each in second] == [2, 2]
        said = "".join(each.output() for each in second)
        assert said.count("another process is running this experiment; wait for it or use out=DIR") == 1
        assert "Traceback" not in said and content_of(out) == before
    for each in first:
        each.process.send_signal(signal.SIGCONT)
    wait_for(first, PATIENCE)
    assert_alike(whole, out)


@pytest.mark.slow
def test_torchrun_itself_starts_a_run_and_starts_it_over(whole: Path, smoke_root: Path, tmp_path: Path) -> None:
    torchrun = shutil.which("torchrun", path=str(Path(sys.executable).parent))
    assert torchrun is not None
    command = [torchrun, "--nproc_per_node=2", f"--master_port={free_port()}", "-m", "mcit_lightning"]
    for _ in range(2):  # the second time there is a finished run, which rank one must not see
        wait_for([start([*command, *settings(smoke_root, tmp_path / "run", "overwrite=true")], tmp_path)], PATIENCE)
        assert_alike(whole, tmp_path / "run")
    again = start([*command, *settings(smoke_root, tmp_path / "run")], tmp_path)
    assert again.process.wait(timeout=PATIENCE) != 0
    assert "the run is finished" in again.output() and "rank zero could not start" in again.output()


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_two_nodes_of_a_slurm_job(engine: str, two: Two, whole: Path, smoke_root: Path, tmp_path: Path) -> None:
    arguments = settings(smoke_root, tmp_path / "run", f"trainer.strategy={engine}")
    wait_for(two(of_slurm, arguments, tmp_path), PATIENCE)
    if engine == "ddp":
        assert_alike(whole, tmp_path / "run")
    assert steps(tmp_path / "run") == [4]
    assert len((tmp_path / "run/predictions/stage_01/colours.jsonl").read_text().splitlines()) == 5
