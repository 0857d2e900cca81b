"""Zero-cost proxy: how strongly the loss of a task pulls at each linear of the pretrained model.

D-MoLE (Ge et al., ICML 2025, Eq. 3): the score of a module m is || (1/|S|) sum over x in S of dL(x)/dW_m ||_2 over a small random
sample S of the task, L(x) being the mean cross-entropy of x's answer tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mcit_lightning.loss import Batch, sample_losses
from mcit_lightning.sharding import lockstep
from mcit_lightning.towers import Towers


def gradient_scores(
    towers: Towers,
    paths: Sequence[str],
    batches: Iterable[Batch],
    samples: int,
    *,
    bias: bool = False,
    offload: bool = False,
    context: Callable[[], AbstractContextManager[object]] = torch.enable_grad,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float]:
    """Gradient norms of linears of the pretrained model (adapters are left out, nothing is changed).

    A weight's gradient is added up in float32 as soon as it arrives and then freed, so the extra memory is one float32 copy of
    the candidates plus a single gradient, however many other parameters the model has. Samples are weighted alike whatever
    batch or process they are in, so the result does not depend on either, up to rounding.

    Args:
        paths: modules to score, adapted or not.
        batches: this process's share of the sample, on the model's device.
        samples: |S|, over all processes.
        bias: add the norm of the bias' gradient where a module has one (the released code).
        offload: keep the sums in host memory, if the device has no room for them; costs a copy per gradient.
        context: what the forward runs in, for example the precision's autocast.
        reduce: sums a tensor over the processes.

    Returns:
        Module path -> score.
    """
    modules = {path: towers.model.get_submodule(path) for path in paths}
    parameters: dict[tuple[str, str], torch.nn.Parameter] = {}
    for path, module in modules.items():
        parameters[path, "weight"] = module.weight  # type: ignore[assignment]
        if bias and module.bias is not None:
            parameters[path, "bias"] = module.bias  # type: ignore[assignment]
    sums: dict[tuple[str, str], Tensor] = {}
    hooks: list[Any] = []
    trained = [parameter for parameter in towers.model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        for key, parameter in parameters.items():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(_collect(sums, key, offload)))
        with towers.pretrained():
            for batch, counts in lockstep(batches, towers):
                with context():
                    loss = sample_losses(towers.model, batch).sum() * (counts / samples)
                if loss.requires_grad:
                    loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
    scores = dict.fromkeys(paths, 0.0)
    for key, parameter in parameters.items():
        # a process without a sample, or a tower that no sample reached, has no gradient but takes part in the sum
        total = sums.pop(key, None)
        own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        total = torch.zeros_like(own, dtype=torch.float32) if total is None else total.to(own.device)
        if isinstance(parameter, DTensor):  # each process has a slice of the mean over them
            scores[key[0]] += parameter.device_mesh.size() * float(reduce(total.square().sum()).sqrt())
        else:
            scores[key[0]] += float(reduce(total).norm())
    return scores


def _collect(sums: dict[tuple[str, str], Tensor], key: tuple[str, str], offload: bool) -> Callable[[Tensor], None]:
    """A hook that moves a parameter's gradient into the sums."""

    def hook(parameter: Tensor) -> None:
        assert parameter.grad is not None
        sharded = isinstance(parameter.grad, DTensor)  # FSDP2 uses the memory of its gradients again
        own = parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
        gradient = own.to("cpu" if offload else own.device, torch.float32, copy=sharded)
        parameter.grad = None
        if key in sums:
            sums[key] += gradient
        else:
            sums[key] = gradient

    return hook
