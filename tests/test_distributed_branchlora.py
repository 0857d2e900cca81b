"""BranchLoRA on two gloo processes: the ranks agree to the last bit, and with one process where the arithmetic is the same.

Noise on the routers is drawn per rank, so with noise only the keys (of frozen embeddings) are those of a single process. Without
it everything is, up to the rounding of sums in another order: all answers of the smoke tasks have the same number of tokens, so
the mean over ranks of their mean losses is the mean over the whole batch.
"""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from processes import start_ranks, wait_for
from torch import Tensor

from callbacks import BranchFreeze
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run

pytestmark = pytest.mark.slow

TASKS = ("colours", "counts")
JOBS = {
    "noise": ["strategy.router_noise=0.7"],
    "learned": ["strategy.router_noise=0.0", "strategy.selector=learned_keys", "optim.strategy_lr=0.02"],
}
"""Name -> what the two compared runs of that name have."""


class DumpTask(L.Callback):
    """Writes what a rank holds at the end of a task to `<folder>/<stage>_rank<r>.pt`.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        freezer = next(callback for callback in trainer.callbacks if isinstance(callback, BranchFreeze))  # type: ignore[attr-defined]
        state = pl_module.state_dict()
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {
            "usage": freezer.state_dict()["usage"],
            "weights": {key: state[key] for key in sorted(pl_module.saved_keys()) if isinstance(state[key], Tensor)},
            "structure": pl_module.structure.to_list(),
            "trained": [key for key, value in pl_module.named_parameters() if value.requires_grad],
        }
        torch.save(content, self.folder / f"{pl_module.stage.name}_rank{trainer.global_rank}.pt")


def work(data: str, out: str, devices: int) -> None:
    """Run every job; in a process of its own, one per rank."""
    for name, overrides in JOBS.items():
        folder = f"{out}/{name}"
        callbacks = ["RouterSpawn", "BranchFreeze", "StageCost", "BackwardTransfer"]
        nodes = ", ".join(f"{{_target_: callbacks.{callback}}}" for callback in callbacks)
        settings = [
            f"data.root={data}",
            "prepare=null",
            f"out={folder}/run",
            f"callbacks=[{nodes}, {{_target_: {__name__}.DumpTask, folder: {folder}}}, {{_target_: callbacks.StageCheckpoint}}]",
            f"order=[{','.join(TASKS)}]",
            f"trainer.devices={devices}",
            f"data.batch_size={4 // devices}",
            "data.group_by_length=false",
            "data.limit_train=12",
            "data.limit_val=4",
            "data.limit_test=4",
            "zero_shot=false",
            "optim.lr=1e-3",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            *overrides,
        ]
        run(load_config(experiments_dir() / "branchlora_smoke.yaml", settings))


@pytest.fixture(scope="module")
def runs(smoke_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with the dumps of two processes with batches of two, and of one with batches of four."""
    root = tmp_path_factory.mktemp("distributed")
    code = f"import {__name__} as test; test.work({str(smoke_root)!r}, {str(root / 'two')!r}, 2)"
    processes = start_ranks(code, 2, root)
    try:
        work(str(smoke_root), str(root / "one"), 1)
    finally:
        wait_for(processes, 600)
    return {"one": root / "one", "two": root / "two"}


def dump(folder: Path, task: str, rank: int = 0) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / f"{task}_rank{rank}.pt", weights_only=True)
    return content


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("task", TASKS)
def test_the_ranks_agree_to_the_last_bit(job: str, task: str, runs: dict[str, Path]) -> None:
    first, second = (dump(runs["two"] / job, task, rank) for rank in (0, 1))
    assert torch.equal(first["usage"], second["usage"])
    assert first["structure"] == second["structure"] and first["trained"] == second["trained"]
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert torch.equal(value, second["weights"][name]), name
    # 12 samples, of each two branches: counted over both ranks
    assert first["usage"][:, 0].sum(1).tolist() == [24.0] * 14
    record = first["structure"][-1]
    assert record["kind"] == "FreezeRecord" and {len(names) for names in record["branches"].values()} == {2}


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_equal_one_without_noise(task: str, runs: dict[str, Path]) -> None:
    one, two = (dump(runs[number] / "learned", task) for number in ("one", "two"))
    assert torch.equal(one["usage"][:, 0], two["usage"][:, 0])
    torch.testing.assert_close(one["usage"][:, 1], two["usage"][:, 1], rtol=1e-3, atol=1e-3)
    assert one["structure"] == two["structure"] and one["trained"] == two["trained"]
    moved = []
    for name, value in one["weights"].items():
        if "_extra_state" not in name:
            torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4, msg=name)
            moved.append(value.float().norm())
    assert len(moved) > 80


@pytest.mark.parametrize("task", TASKS)
def test_keys_of_two_processes_are_those_of_one(task: str, runs: dict[str, Path]) -> None:
    one, two = (dump(runs[number] / "noise", task)["weights"] for number in ("one", "two"))
    for table in ("image_keys", "text_keys"):
        name = f"strategy.selector.{table}.{task}"
        assert one[name].norm() > 1
        torch.testing.assert_close(two[name], one[name], rtol=1e-4, atol=1e-4)
