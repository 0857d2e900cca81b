"""Zero-cost proxy: how strongly the loss of a task pulls at each linear of the pretrained model.

D-MoLE (Ge et al., ICML 2025, Eq. 3): the score of a module m is || (1/|S|) sum over x in S of dL(x)/dW_m ||_2 over a small random
sample S of the task, L(x) being the mean cross-entropy of x's answer tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mcit_lightning.loss import Batch, answer_loss, sample_losses
from mcit_lightning.sharding import lockstep
from mcit_lightning.towers import Towers
from mcit_lightning.weight_gradients import adding_gradients


def gradient_scores(
    towers: Towers,
    paths: Sequence[str],
    batches: Iterable[Batch],
    samples: int,
    *,
    bias: bool = False,
    by_batch: bool = False,
    offload: bool = False,
    dtype: torch.dtype | None = torch.float32,
    context: Callable[[], AbstractContextManager[object]] = torch.enable_grad,
    reduce: Callable[[Tensor], Tensor] = lambda total: total,
) -> dict[str, float]:
    """Gradient norms of linears of the pretrained model (adapters are left out, nothing is changed).

    The extra memory is one float32 copy of the candidates plus a single gradient, however many other parameters the model has
    (see `adding_gradients`); a norm of a mean needs the sum. `parts` splits the candidates for less memory. Samples are weighted
    alike whatever batch or process they are in, so the result does not depend on either, up to rounding.

    Args:
        paths: modules to score, adapted or not.
        batches: this process's share of the sample, on the model's device.
        samples: |S|, over all processes.
        bias: add the norm of the bias' gradient where a module has one (the released code).
        by_batch: average over the tokens of a batch instead of over each sample's; scores then depend on the batches.
        dtype: type of the sums; None is the gradient's own, in which small ones are lost.
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
    with adding_gradients(towers.model, parameters, sums, offload=offload, dtype=dtype), towers.pretrained():
        for batch, counts in lockstep(batches, towers):
            with context():
                if by_batch:
                    loss = answer_loss(towers.model, batch).loss * (counts * len(batch["id"]) / samples)
                else:
                    loss = sample_losses(towers.model, batch).sum() * (counts / samples)
            if loss.requires_grad:
                loss.backward()
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


def evaluate_with_checkpointing(model: nn.Module) -> None:
    """Evaluation mode, so that dropout does not make scores random, but for the modules that checkpoint activations.

    transformers recomputes them in training mode only. Their own `eval()` ends this.
    """
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def parts(towers: Towers, paths: Sequence[str], count: int) -> list[list[str]]:
    """The paths in at most `count` runs of about as many weights, in their order."""
    sizes = [towers.model.get_submodule(path).weight.numel() for path in paths]  # type: ignore[operator]
    found: list[list[str]] = [[] for _ in range(count)]
    before = 0
    for path, size in zip(paths, sizes, strict=True):
        found[min(count - 1, (2 * before + size) * count // (2 * sum(sizes)))].append(path)
        before += size
    return [part for part in found if part]
