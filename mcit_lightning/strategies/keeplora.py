"""KeepLoRA (Luo et al., ICLR 2026): a task learns in the directions that pretraining and earlier tasks have left free."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.loss import Batch, sample_losses
from mcit_lightning.plans import FreezeRecord, TaskPlan
from mcit_lightning.snapshots import ParameterTable, sum_over_ranks
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.strategies.task_lora import TaskLoRA
from mcit_lightning.towers import Towers
from mcit_lightning.weight_gradients import adding_gradients

logger = logging.getLogger(__name__)


@dataclass
class KeepLoRAConfig(LoRAConfig):
    """The values of the released scripts for LLaVA, but for the rank (theirs is 32)."""

    alpha: float = 2.0
    """A quarter of the rank in the released scripts: the rows of A have length one, three times that of a usual LoRA's."""
    weight_energy: float = 0.6
    """Part of a pretrained weight's squared singular values that is protected from all tasks."""
    task_energy: float = 0.99
    """Part of a task's gradient that is protected from later tasks."""
    gradient_fraction: float = 0.2
    """Part of a task's training samples that its gradients are taken of."""
    gradient_minimum: int = 64
    """Samples at least, if there are so many."""
    gradient_offload: bool = False
    """Keep the summed gradients in host memory: they are a float32 copy of the targets' weights."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight_energy", "task_energy", "gradient_fraction"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be in (0, 1]")
        if self.gradient_minimum < 1:
            raise ValueError(f"gradient_minimum: is {self.gradient_minimum}, must be at least 1")


@STRATEGIES.register("keeplora")
class KeepLoRA(TaskLoRA):
    """A LoRA per task, all summed; A is fixed before the task in directions that nothing depends on yet, and only B trains.

        M_0 = the leading right singular vectors of W0            M [k, d_in], orthonormal rows, per module
        A_t = the r leading right singular vectors of G - G M^T M,    G = dL/dW on the task's samples, before it is learnt
        M <- [M; leading right singular vectors of G' - G' M^T M],    G' = dL/dW after it

    M grows until it holds `task_energy` of the squared norm of G'. Written after the released code for LLaVA; the paper's
    abstract speaks of the dominant directions of a task's features, for which that code takes those of its gradients (which lie
    in the span of the features). The singular vectors of A are found with 8 more than needed and two power iterations. Left out:
    the variant for CLIP. The projector is shared by all tasks and not protected.
    """

    Config = KeepLoRAConfig
    config: KeepLoRAConfig
    shards = False
    needs_base_gradients = True

    def __init__(self, config: KeepLoRAConfig) -> None:
        super().__init__(config)
        self.protected = ParameterTable()
        """Module path -> M."""
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The stage's LoRA; with the first one, an empty M per module."""
        super().grow(towers, plan)
        for path in plan.ranks:
            if path not in self.protected:
                weight = towers.adapters[path].weight
                self.protected[path] = torch.zeros(0, weight.shape[1], device=weight.device)

    def trainable(self, towers: Towers, stage: Stage) -> Iterator[nn.Parameter]:
        """B of the stage's branches."""
        yield from (layer.lora_b[stage.name] for layer in towers.adapters.values())

    def preview_samples(self, rows: int) -> int:
        """Samples for G."""
        return min(rows, max(self.config.gradient_minimum, round(self.config.gradient_fraction * rows)))

    def review_samples(self, rows: int) -> int:
        """Samples for G', the same ones."""
        return self.preview_samples(rows)

    def preview(self, towers: Towers, batch: Batch, stage: Stage) -> None:
        """Add a batch to G."""
        weights = {path: layer.base.weight for path, layer in towers.adapters.items()}
        with adding_gradients(towers.model, weights, self._sums, offload=self.config.gradient_offload):
            loss = sample_losses(towers.model, batch).sum()
            if loss.requires_grad:
                loss.backward()
        self._count += len(batch["id"])

    def review(self, towers: Towers, batch: Batch, stage: Stage) -> None:
        """Add a batch to G'."""
        self.preview(towers, batch, stage)

    @torch.no_grad()
    def begin_task(self, towers: Towers, stage: Stage) -> None:
        """M_0 before the first task, and A of this one."""
        full = []
        for path, gradient in self._gradients(towers):
            layer = towers.adapters[path]
            if not len(self.protected[path]):
                self.protected[path] = leading(layer.weight.float(), self.config.weight_energy)
            basis, a = self.protected[path], layer.lora_a[stage.name]
            seed = derive_seed(self.seed, "keeplora", stage.index, path)
            a.copy_(without(top_right(without(gradient, basis), a.shape[0], seed), basis))
            if len(basis) + a.shape[0] > layer.in_features:
                full.append(path)
        if full:
            logger.warning(
                "stage %s: in %d of %d modules fewer than rank=%d directions are free, so it can hardly learn there. Lower "
                "strategy.task_energy or strategy.weight_energy",
                stage.name,
                len(full),
                len(towers.adapters),
                self.config.rank,
            )

    @torch.no_grad()
    def end_task(self, towers: Towers, stage: Stage) -> FreezeRecord | None:
        """Protect what the task depends on."""
        for path, gradient in self._gradients(towers):
            basis = self.protected[path]
            more = leading(without(gradient, basis), self.config.task_energy, total=float(gradient.square().sum()))
            self.protected[path] = torch.cat([basis, more])[: basis.shape[1]]
        return None

    def _gradients(self, towers: Towers) -> Iterator[tuple[str, Tensor]]:
        """Paths and mean gradients [d_out, d_in] over all ranks' samples, one at a time; empties the sums."""
        device = towers.model.device
        count = float(sum_over_ranks(torch.tensor(float(self._count), device=device)))
        for path, layer in towers.adapters.items():
            own = self._sums.pop(path, None)
            own = torch.zeros_like(layer.weight, dtype=torch.float32) if own is None else own.to(device)
            yield path, sum_over_ranks(own) / max(count, 1.0)
        self._sums, self._count = {}, 0


def without(rows: Tensor, basis: Tensor) -> Tensor:
    """[n, d], rows minus their part in the span of `basis` [k, d], whose rows are orthonormal."""
    return rows - (rows @ basis.T) @ basis


def leading(matrix: Tensor, energy: float, total: float | None = None) -> Tensor:
    """[k, d], the fewest leading right singular vectors that hold a part of the squared norm.

    Args:
        matrix: [n, d].
        energy: the part, in (0, 1].
        total: the norm squared of which it is a part; None for the matrix's own. What the matrix lacks of it counts as held.
    """
    _, values, vectors = torch.linalg.svd(matrix, full_matrices=False)
    held = values.square()
    whole = float(held.sum()) if total is None else total
    before = max(0.0, whole - float(held.sum())) + held.cumsum(0) - held  # what is held without each vector
    count = int((before < energy * whole * (1 - 1e-6)).sum())
    return vectors[:count]


def top_right(matrix: Tensor, rank: int, seed: int) -> Tensor:
    """[rank, d], the leading right singular vectors of [n, d]; rows beyond min(n, d) are zero."""
    width = min(rank + 8, *matrix.shape)
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        _, _, vectors = torch.svd_lowrank(matrix, q=width, niter=2)
    found = vectors.T[:rank]
    return torch.cat([found, found.new_zeros(rank - len(found), matrix.shape[1])])
