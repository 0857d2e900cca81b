"""Shared fixtures: the smoke model and tasks, written once per test session, and a clean process around every test."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mcit_lightning import smoke
from mcit_lightning.config import BackboneConfig, DataConfig, ExperimentConfig, OptimConfig, TaskConfig

SMOKE_TASKS = ("colours", "shapes", "counts")
LAUNCH_VARIABLES = ("LOCAL_RANK", "PL_GLOBAL_SEED", "PL_SEED_WORKERS", "RANK", "WORLD_SIZE", "TOKENIZERS_PARALLELISM")
LAUNCH_PREFIXES = ("SLURM_", "MASTER_")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _clean_process() -> Iterator[None]:
    """Undo what a Lightning run leaves behind: launch variables and the process group."""
    before = _launch_variables()
    yield
    for name in _launch_variables():
        del os.environ[name]
    os.environ.update(before)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _launch_variables() -> dict[str, str]:
    return {
        name: value
        for name, value in os.environ.items()
        if name in LAUNCH_VARIABLES or name.startswith(LAUNCH_PREFIXES)
    }


@pytest.fixture(scope="session")
def smoke_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the tiny model (`model/`) and the tasks of `SMOKE_TASKS`. Read only: copy what a test changes."""
    root = tmp_path_factory.mktemp("smoke") / "data"
    smoke.prepare(root)
    return root


@pytest.fixture(scope="session")
def smoke_processor(smoke_root: Path) -> Any:
    """The processor of the tiny model."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(smoke_root / "model")


@pytest.fixture(scope="session")
def smoke_config(smoke_root: Path) -> Callable[..., ExperimentConfig]:
    """`smoke_config(**changes)`: a new experiment over the smoke tasks.

    A change replaces a top-level field, except `data`, `optim` and `backbone`, whose dictionaries change single keys.
    """

    def build(
        *,
        data: dict[str, Any] | None = None,
        optim: dict[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        **changes: Any,
    ) -> ExperimentConfig:
        fields: dict[str, Any] = {
            "name": "smoke",
            "order": list(SMOKE_TASKS),
            "tasks": {
                task: TaskConfig(train=f"{task}/train.json", val=f"{task}/val.json", test=f"{task}/test.json")
                for task in SMOKE_TASKS
            },
            "strategy": {"name": "sequential"},
            "trainer": {"accelerator": "cpu", "devices": 1},
            **changes,
        }
        return ExperimentConfig(
            data=DataConfig(
                **{"root": str(smoke_root), "batch_size": 4, "eval_batch_size": 4, "max_new_tokens": 4, **(data or {})}
            ),
            optim=OptimConfig(**(optim or {})),
            backbone=BackboneConfig(**{"id": str(smoke_root / "model"), **(backbone or {})}),
            **fields,
        )

    return build


@pytest.fixture(scope="session")
def steps(smoke_config: Callable[..., ExperimentConfig]) -> Callable[..., Any]:
    """`steps(name, hyper-parameter=value, ...)`: a strategy on the smoke tasks, driven by hand."""
    from stage_steps import Steps

    def make(name: str, *, config: dict[str, Any] | None = None, **options: Any) -> Steps:
        return Steps(smoke_config(strategy={"name": name, "rank": 2, "alpha": 4.0, **options}, **(config or {})))

    return make


@pytest.fixture(scope="session")
def experiment(smoke_root: Path) -> Callable[..., ExperimentConfig]:
    """`experiment(out, *overrides)`: the smoke experiment with fewer rows, for a given run directory."""
    from smoke_runs import small_experiment

    return lambda out, *overrides: small_experiment(smoke_root, out, *overrides)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Starts the command line in new processes at little cost; see `Nursery`."""
    from nursery import Nursery

    with Nursery(tmp_path_factory.mktemp("nursery")) as nursery:
        yield nursery


@pytest.fixture(scope="session")
def uninterrupted(experiment: Callable[..., ExperimentConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a whole run of `experiment`."""
    from mcit_lightning.runner import run

    root = tmp_path_factory.mktemp("runs") / "uninterrupted"
    run(experiment(root))
    return root
