"""A short training of a few parameters outside of a stage's own, with the same result on any number of processes."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from mcit_lightning.config import OptimConfig
from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.loss import Batch, answer_logits
from mcit_lightning.optimization import build_schedule
from mcit_lightning.snapshots import sum_over_ranks

MAX_NORM = 1.0
"""Gradients are clipped to this norm, as the trainers of Hugging Face do by default."""


@dataclass(frozen=True)
class TuningRecipe:
    """AdamW without weight decay, a linear warm-up, then a cosine to zero.

    Args:
        epochs: passes over the samples.
        lr: highest learning rate.
        batch_size: samples per step, over all processes.
        warmup_ratio: share of the steps in which the rate rises.
        seed: of the order of the samples.
    """

    epochs: int
    lr: float
    batch_size: int
    warmup_ratio: float
    seed: int

    def steps(self, samples: int) -> list[list[int]]:
        """Positions of every step's samples: each epoch shows all of them, in an order of its own."""
        found = []
        for epoch in range(self.epochs):
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "tuning", epoch))
            order = torch.randperm(samples, generator=generator).tolist()
            found += [order[start : start + self.batch_size] for start in range(0, samples, self.batch_size)]
        return found


def tune(
    model: PreTrainedModel,
    parameters: Sequence[nn.Parameter],
    batches: Iterable[tuple[Batch, bool]],
    recipe: TuningRecipe,
    steps: int,
    *,
    acting: Callable[[Batch], AbstractContextManager[None]],
    context: Callable[[], AbstractContextManager[object]],
) -> tuple[float, float]:
    """Minimise the cross-entropy of the answers' tokens. Collective: every process takes part in every step.

    Gradients are sums over all processes, divided by the number of tokens of the whole step.

    Args:
        model: what computes; nothing else of it changes.
        parameters: what trains; they are frozen before and after. One that the loss does not reach has no gradient.
        batches: for every step this process's part of it, and whether that counts.
        steps: their number.
        acting: context in which the model computes a batch with `parameters`.
        context: of the Trainer's precision, around the forward pass.

    Returns:
        The mean loss per token of the first and of the last epoch.

    Raises:
        ValueError: the loss is not a finite number.
    """
    optimizer = torch.optim.AdamW(parameters, lr=recipe.lr, weight_decay=0.0)
    schedule = build_schedule(optimizer, OptimConfig(warmup_ratio=recipe.warmup_ratio), steps)
    seen = []
    with _training_only(model, parameters):
        for batch, counts in batches:
            with acting(batch):
                with context():
                    losses = F.cross_entropy(answer_logits(model, batch).float(), batch["targets"], reduction="sum")
                gradients = torch.autograd.grad(losses * float(counts), parameters, materialize_grads=True)
            tokens = torch.full_like(losses, float(counts * batch["targets"].numel()))
            total = sum_over_ranks(torch.stack([losses.detach() * float(counts), tokens]))
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = sum_over_ranks(gradient).div_(total[1])
            nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            seen.append(total)
    assert len(seen) == steps, (len(seen), steps)
    size = steps // recipe.epochs
    means = [torch.stack(part).sum(0).tolist() for part in (seen[:size], seen[-size:])]
    first, last = (loss / tokens for loss, tokens in means)
    if not math.isfinite(last):
        raise ValueError(f"the loss is not a finite number after {steps} steps at a learning rate of {recipe.lr}")
    return first, last


@contextmanager
def _training_only(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Context in which these parameters require gradients and no others do."""
    others = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter in others:
            parameter.requires_grad_(True)
