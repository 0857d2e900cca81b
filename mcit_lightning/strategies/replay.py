"""Experience replay (Rolnick et al., NeurIPS 2019; Chaudhry et al. 2019): a few samples of earlier tasks are trained on again."""

from collections.abc import Mapping
from dataclasses import dataclass

from mcit_lightning.data.replay import Replay
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.sequential import LoRAConfig, Sequential


@dataclass
class ReplayConfig(LoRAConfig):
    """A buffer of fixed size, shared by all earlier tasks."""

    buffer: int = 300
    """Samples of all earlier tasks together; each has an equal part of it."""
    share: float | None = None
    """Part of every batch that is replayed (the ratio sampler); Chaudhry et al. take as many old samples as new ones, 0.5. None
    shuffles the buffer among the task's samples, so that each is seen once per epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.buffer < 1:
            raise ValueError(f"buffer: is {self.buffer}, must be at least 1")
        if self.share is not None and not 0 < self.share < 1:
            raise ValueError(f"share: is {self.share}, must be in (0, 1), or null")


@STRATEGIES.register("replay")
class ExperienceReplay(Sequential):
    """One LoRA (and the projector, if it trains) on the task's samples and a buffer of earlier ones.

        L = sum over the mixed batch of the answer tokens' cross-entropy

    The buffer is a random sample of each earlier task's training data, as large for one task as for the other, so it shrinks per
    task while tasks are added, and never takes back what it has dropped. Left out: Chaudhry et al.'s other ways to fill the
    buffer (reservoir, ring, k-means), which differ where a stream has no task boundaries, and Rolnick et al.'s cloning loss.
    """

    Config = ReplayConfig
    config: ReplayConfig

    def replay(self, stage: Stage, rows: Mapping[str, int]) -> Replay:
        """An equal part of the buffer for each earlier task; what does not divide goes to the first ones."""
        size, rest = divmod(self.config.buffer, max(1, len(rows)))
        parts = {task: size + (place < rest) for place, task in enumerate(rows)}
        kept = {task: min(part, rows[task]) for task, part in parts.items()}
        return Replay({task: count for task, count in kept.items() if count}, self.config.share)
