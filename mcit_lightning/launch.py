"""Who started the processes of a run: Lightning itself, torchrun or SLURM; and what they agree on before they are connected."""

import itertools
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any

from lightning.pytorch.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch.distributed import Store, rendezvous

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=10)
"""How long the processes of one launch wait for each other to start."""

_turns = itertools.count()


def launcher() -> ClusterEnvironment | None:
    """SLURM or torchrun, if one of them has started this process; None where Lightning starts the others.

    Lightning's requeue of SLURM jobs is off: it would load its own checkpoint into every fit and test of the run.

    Raises:
        ValueError: the SLURM job was submitted with `--ntasks` alone.
    """
    if "SLURM_NTASKS" in os.environ and SLURMEnvironment.job_name() not in ("bash", "interactive"):
        try:
            return SLURMEnvironment(auto_requeue=False)
        except RuntimeError as error:
            raise ValueError(f"SLURM: {error}") from error
    return TorchElasticEnvironment() if TorchElasticEnvironment.detect() else None


def cluster_plugins() -> list[ClusterEnvironment]:
    """What the Trainer is to be told about the launcher: SLURM without Lightning's requeue; it finds torchrun by itself."""
    cluster = launcher()
    return [cluster] if isinstance(cluster, SLURMEnvironment) else []


def launched_processes() -> tuple[int, int] | None:
    """(processes per node, nodes) that SLURM or torchrun has started; None without them, or where they do not say."""
    if "SLURM_NTASKS" in os.environ and isinstance(launcher(), SLURMEnvironment):
        nodes = int(os.environ.get("SLURM_NNODES", "1"))
        return int(os.environ.get("SLURM_NTASKS_PER_NODE", "0")) or int(os.environ["SLURM_NTASKS"]) // nodes, nodes
    if "LOCAL_WORLD_SIZE" in os.environ and TorchElasticEnvironment.detect():
        here = int(os.environ["LOCAL_WORLD_SIZE"])
        return here, int(os.environ["WORLD_SIZE"]) // here
    return None


def check_launch(trainer: Mapping[str, Any]) -> None:
    """Whether the processes that the `trainer` section asks for can be there.

    Raises:
        ValueError: several nodes without torchrun or SLURM, or another number of processes than those have started.
    """
    started = launched_processes()
    nodes = int(trainer.get("num_nodes", started[1] if started else 1))
    if started is None:
        if nodes > 1:
            raise ValueError(
                f"trainer.num_nodes: is {nodes}, but nothing has started processes on the other nodes. Start the command on "
                "each node with torchrun, or with srun in a SLURM job (docs/distributed.md)"
            )
        return
    devices = trainer.get("devices", "auto")
    asked = len(devices) if isinstance(devices, list) else started[0] if devices in ("auto", -1, "-1") else int(devices)
    if (asked, nodes) != started:
        by = "SLURM" if isinstance(launcher(), SLURMEnvironment) else "torchrun"
        raise ValueError(
            f"trainer.devices, trainer.num_nodes: ask for {asked} process(es) on {nodes} node(s), but {by} has started "
            f"{started[0]} on {started[1]}. Leave both keys out, or change them"
        )


@contextmanager
def rank_zero_first() -> Iterator[None]:
    """Context that rank zero enters first, and that the others enter when it has left.

    Only where torchrun or SLURM has started all processes at once: where Lightning starts them, rank zero is past that point.

    Raises:
        ValueError: on the other processes, if rank zero has failed inside.
    """
    cluster = launcher()
    if cluster is None or cluster.world_size() == 1:
        yield
        return
    key = f"mcit_lightning/{next(_turns)}"
    if cluster.global_rank() == 0:
        store = _store(cluster.main_address, cluster.main_port, 0, cluster.world_size())
        try:
            yield
        except BaseException:
            store.set(key, "failed")
            raise
        store.set(key, "done")
        return
    try:
        store = _store(cluster.main_address, cluster.main_port, cluster.global_rank(), cluster.world_size())
        store.wait([key], PATIENCE)
        done = store.get(key) == b"done"
    except RuntimeError:  # rank zero is gone, and the store with it
        done = False
    if not done:
        raise ValueError("rank zero could not start; see its message")
    yield


@cache
def _store(address: str, port: int, rank: int, world: int) -> Store:
    """Key-value store of the launch, kept open: torch's process group uses the same one later."""
    url = f"tcp://{address}:{port}"
    store: Store = next(iter(rendezvous(url, rank, world, timeout=PATIENCE)))[0]
    return store
