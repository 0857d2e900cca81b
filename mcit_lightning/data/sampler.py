"""Which sample is in which batch on which rank, and the loader that resumes inside an epoch."""

import hashlib
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

MEGABATCH = 50
"""Batches whose samples are sorted together when batches are grouped by length."""


def derive_seed(*parts: int | str) -> int:
    """A seed that depends on every part and on nothing else, the same on every rank and machine."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


class StageSampler(Sampler[int]):
    """One rank's share of an epoch-seeded order.

    The order is drawn from (seed, epoch), so it needs no communication and no global random state. With
    `group_by_length` it is cut into chunks of 50 batches, each chunk is sorted by length and cut into batches, and the
    batches are shuffled.

    Tail: where the samples do not divide by the number of ranks, the order wraps to its start, as `DistributedSampler`
    does, so that every rank has the same number of samples and batches. The last batch may be smaller than the others, on
    all ranks alike.

    Args:
        lengths: estimated length of each sample.
        batch_size: samples per rank and batch.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
        group_by_length: put samples of similar length into the same batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        group_by_length: bool = True,
    ) -> None:
        self.lengths = np.asarray(lengths)
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.group_by_length = group_by_length
        self.epoch = 0
        self.skip = 0
        """Samples that the next iteration, and only that one, leaves out at its start."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the order; Lightning calls this before every epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.world_size)

    def __iter__(self) -> Iterator[int]:
        mine = self.order()[self.rank :: self.world_size]
        skip, self.skip = self.skip, 0
        yield from mine[skip:].tolist()

    def order(self) -> np.ndarray:
        """The epoch's order for all ranks; position `i` belongs to rank `i % world_size`."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", self.epoch))
        shuffled = torch.randperm(len(self.lengths), generator=generator).numpy()
        order = np.resize(shuffled, len(self) * self.world_size)
        if not self.group_by_length:
            return order
        step = self.batch_size * self.world_size
        chunks = [order[start : start + step * MEGABATCH] for start in range(0, len(order), step * MEGABATCH)]
        order = np.concatenate([chunk[np.argsort(-self.lengths[chunk], kind="stable")] for chunk in chunks])
        full = len(order) // step
        batches = torch.randperm(full, generator=generator).numpy()
        body = order[: full * step].reshape(full, step)[batches]
        return np.concatenate([body.reshape(-1), order[full * step :]])


class EvalSlice(Sampler[int]):
    """One rank's share of an evaluation: every sample exactly once over all ranks, nothing padded.

    Longest first, so that a batch holds similar lengths and a batch that does not fit in memory is the first one.

    Args:
        lengths: estimated length of each sample.
        rank: this process.
        world_size: number of processes.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, *, rank: int = 0, world_size: int = 1) -> None:
        order = np.argsort(-np.asarray(lengths), kind="stable")
        self.indices: list[int] = order[rank::world_size].tolist()

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


class Observer(Protocol):
    """Looks on while a loader hands out an epoch; its state is part of the loader's."""

    def observe(self, batch: Mapping[str, Any]) -> None:
        """See a batch in the training process before it is handed out."""
        ...

    def end_epoch(self) -> None:
        """Called after the epoch's last batch was seen and before it is handed out, on every rank."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; called on every rank."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state_dict`."""
        ...


class StageLoader(DataLoader[Any]):
    """A training loader that resumes inside an epoch and draws no index before the sampler knows its epoch.

    `__iter__` is a generator, so nothing happens, in this process or in a worker, before the first batch is asked for;
    by then Lightning has called `set_epoch`. Lightning saves and restores `state_dict` with its checkpoints.

    Args:
        dataset: the stage's samples.
        sampler: decides their order; its batch size is the loader's.
        observer: sees every batch in this process before it is handed out.
        epoch_batches: batches of one epoch if the trainer stops an epoch before the loader ends
            (`limit_train_batches`).
        **kwargs: as for `DataLoader`.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: StageSampler,
        *,
        observer: Observer | None = None,
        epoch_batches: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            dataset,
            batch_size=sampler.batch_size,
            sampler=sampler,
            generator=torch.Generator(),
            worker_init_fn=init_worker,
            **kwargs,
        )
        self.order = sampler
        self.done = 0
        """Batches of the current epoch that were handed out."""
        self._observer = observer
        self._epoch_batches = min(epoch_batches or len(self), len(self))

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # The workers' seed comes from here, not from the global random state, which a resumed process has used
        # differently.
        self.generator.manual_seed(derive_seed(self.order.seed, "workers", self.order.epoch))
        self.done = self.order.skip // self.order.batch_size
        for batch in super().__iter__():
            self.done += 1
            if self._observer is not None:
                self._observer.observe(batch)
                if self.done == self._epoch_batches:
                    self._observer.end_epoch()
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Batches done in this epoch (0 at its end), what the count depends on, and the observer's state."""
        state = {"done": self.done % self._epoch_batches, **self._layout()}
        return state if self._observer is None else {**state, "observer": self._observer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start the next iteration after the batches that are done.

        Raises:
            ValueError: the run was saved with another world size, batch size, number of samples or seed.
        """
        for key, value in self._layout().items():
            if state.get(key) != value:
                raise ValueError(
                    f"The checkpoint was saved with {key}={state.get(key)!r}, but this run has {key}={value!r}, so the "
                    "remaining data of the epoch would be wrong. Continue with the same value, or start the run over "
                    "with overwrite=true."
                )
        self.order.skip = state["done"] * self.order.batch_size
        if self._observer is not None:
            self._observer.load_state_dict(state.get("observer", {}))

    def _layout(self) -> dict[str, Any]:
        return {
            "world_size": self.order.world_size,
            "batch_size": self.order.batch_size,
            "samples": len(self.order.lengths),
            "seed": self.order.seed,
            "group_by_length": self.order.group_by_length,
        }


def init_worker(worker: int) -> None:
    """Prepare a loader process: tokenizers must not start threads of their own in a forked process, and a SIGTERM to the whole
    process group must not end it before its parent has saved. (It ends when the parent asks for nothing more, or is gone.)
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
