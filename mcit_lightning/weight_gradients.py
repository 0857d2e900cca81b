"""Gradients of frozen weights, summed over batches without holding more than one at a time."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

K = TypeVar("K", bound=Hashable)


@contextmanager
def adding_gradients(
    model: nn.Module,
    weights: Mapping[K, Tensor],
    sums: dict[K, Tensor],
    *,
    offload: bool = False,
    dtype: torch.dtype | None = torch.float32,
) -> Iterator[None]:
    """Context in which a backward pass adds the gradients of some weights to `sums`, and reaches no other parameter.

    A gradient is added up as soon as it arrives and then freed, so the extra memory is one copy of the weights plus a single
    gradient. Parameters that train are left out of the graph, so DDP is not woken.

    Args:
        weights: key -> weight; frozen before and after.
        sums: key -> sum so far; a weight that no batch has reached is missing.
        offload: keep the sums in host memory; costs a copy per gradient.
        dtype: type of the sums; None is the gradient's own, in which small ones are lost.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    hooks: list[Any] = []
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for key, weight in weights.items():
            weight.requires_grad_(True)
            hooks.append(weight.register_post_accumulate_grad_hook(_collect(sums, key, offload, dtype)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for weight in weights.values():
            weight.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)


def _collect(sums: dict[K, Tensor], key: K, offload: bool, dtype: torch.dtype | None) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient into the sums."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        sharded = isinstance(parameter.grad, DTensor)  # FSDP2 uses the memory of its gradients again
        own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradient = own.to("cpu" if offload else own.device, dtype or parameter.dtype, copy=sharded)
        parameter.grad = None
        if key in sums:
            sums[key] += gradient
        else:
            sums[key] = gradient

    return hook
