"""AdamW with one named group per tower, and the learning-rate schedule of a stage."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from mcit_lightning.config import OptimConfig


def build_optimizer(
    named: Iterable[tuple[str, nn.Parameter]],
    group_of: Callable[[str], str],
    config: OptimConfig,
    *,
    task_lr: float | None = None,
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters, in named groups (`language`, `vision`, `projector`, `strategy`).

    Args:
        named: names and parameters; frozen ones are skipped.
        group_of: parameter name -> group name.
        task_lr: the task's own rate; takes the place of `lr` and of a tower's rate, not of the projector's or strategy's.
    """
    base = task_lr or config.lr
    rates = {
        "language": base,
        "vision": task_lr or config.vision_lr or config.lr,
        "projector": config.projector_lr or base,
        "strategy": config.strategy_lr or base,
    }
    members: dict[str, list[nn.Parameter]] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            members.setdefault(group_of(name), []).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "name": name, "lr": rates[name]} for name, parameters in members.items()
    ]
    return torch.optim.AdamW(groups, lr=base, betas=config.betas, weight_decay=config.weight_decay)


def build_schedule(optimizer: torch.optim.Optimizer, config: OptimConfig, steps: int) -> LambdaLR:
    """Linear warm-up over `warmup_ratio` of the stage's steps, then the configured decay to zero.

    Args:
        steps: optimizer steps of the stage.
    """
    warmup = math.ceil(config.warmup_ratio * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        progress = min(1.0, (step - warmup) / max(1, steps - warmup))
        if config.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1 - progress if config.schedule == "linear" else 1.0

    return LambdaLR(optimizer, factor)


def epoch_steps(batches: int, limit: int | float | None, accumulate: int) -> int:
    """Optimizer steps of an epoch.

    Args:
        batches: of a process.
        limit: the Trainer's `limit_train_batches`: a number of batches, or a share of them.
        accumulate: batches per step; an epoch's last step may have fewer.
    """
    if limit is not None:
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return -(-batches // accumulate)
