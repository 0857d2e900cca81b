"""Samples of earlier tasks in a stage's training: which ones are kept, and how many of every batch they are."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mcit_lightning.data.sampler import StageSampler, derive_seed


@dataclass(frozen=True)
class Replay:
    """What a strategy wants to see again in a stage.

    Args:
        rows: earlier task -> how many of its training samples the stage may use.
        share: part of every batch that they are; None shuffles them among the task's own samples, each once per epoch.
    """

    rows: dict[str, int] = field(default_factory=dict)
    share: float | None = None

    def per_batch(self, batch_size: int) -> int:
        """Samples of earlier tasks in a batch; 0 where they are shuffled among the others, or there are none.

        Raises:
            ValueError: the share leaves no place for the task, or for what is replayed.
        """
        if self.share is None or not any(self.rows.values()):
            return 0
        count = round(self.share * batch_size)
        if not 0 < count < batch_size:
            raise ValueError(
                f"strategy.share: {self.share} of a batch of {batch_size} is {count} replayed and {batch_size - count} new "
                "samples, and there must be some of both. Change the share, or raise data.batch_size"
            )
        return count


def kept_rows(total: int, count: int, *, seed: int, task: str) -> np.ndarray:
    """[count], positions in a task's training split that a buffer of that size holds.

    A smaller buffer is the beginning of a larger one, so one that has to make room for a new task only ever drops samples. It
    depends on the seed and the task alone: nothing needs to be stored, and every rank and resumed run has the same.

    Args:
        total: samples of the split.
        count: samples to keep; all if there are fewer.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "replay", task))
    return torch.randperm(total, generator=generator)[:count].numpy()


class ReplaySampler(StageSampler):
    """An epoch-seeded order in which every batch of every rank holds the same number of replayed samples.

    An epoch shows each of the stage's own samples once, as `StageSampler` does with the rest of the batch. The replayed ones are
    drawn without repetition until all were shown, then again, continuing from epoch to epoch in an order of its own.

    Args:
        lengths: estimated length of each sample; the stage's own first, then what may be replayed.
        own: number of the stage's own samples.
        replayed: replayed samples in a batch.
        batch_size: samples per rank and batch, the replayed ones included.
        rank: this process.
        world_size: number of processes.
        seed: of the order.
        group_by_length: put the stage's own samples of similar length into the same batch.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        *,
        own: int,
        replayed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        seed: int = 0,
        group_by_length: bool = True,
    ) -> None:
        super().__init__(
            lengths,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            seed=seed,
            group_by_length=group_by_length,
        )
        assert 0 < replayed < batch_size and 0 < own < len(self.lengths)
        self.replayed = replayed
        self.own = StageSampler(
            self.lengths[:own],
            batch_size=batch_size - replayed,
            world_size=world_size,
            seed=seed,
            group_by_length=group_by_length,
        )

    def __len__(self) -> int:
        return len(self.own) + self.replayed * self._batches()

    def order(self) -> np.ndarray:
        """The epoch's order for all ranks: in every step the stage's own samples, then the replayed ones."""
        self.own.set_epoch(self.epoch)
        own = self.own.order()
        step, again = self.own.batch_size * self.world_size, self.replayed * self.world_size
        replayed = self._replayed(self.epoch * self._batches() * again, self._batches() * again)
        parts: list[np.ndarray] = []
        for batch in range(self._batches()):
            parts += [own[batch * step : (batch + 1) * step], replayed[batch * again : (batch + 1) * again]]
        return np.concatenate(parts)

    def _batches(self) -> int:
        return -(-len(self.own) // self.own.batch_size)

    def _replayed(self, start: int, count: int) -> np.ndarray:
        """[count], the draws from number `start` on: one permutation of the buffer after the other."""
        first = len(self.own.lengths)
        size = len(self.lengths) - first
        rounds = range(start // size, -(-(start + count) // size))
        draws = np.concatenate([self._permutation(size, number) for number in rounds]) + first
        return draws[start % size :][:count]

    def _permutation(self, size: int, number: int) -> np.ndarray:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "replay", number))
        return torch.randperm(size, generator=generator).numpy()
