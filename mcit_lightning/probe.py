"""Zero-cost proxy: how strongly the loss of a task pulls at each linear of the pretrained model.

D-MoLE (Ge et al., ICML 2025, Eq. 3): the score of a module m is || (1/|S|) sum over x in S of dL(x)/dW_m ||_2 over a small random
sample S of the task, L(x) being the mean cross-entropy of x's answer tokens.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from mcit_lightning.loss import Batch, sample_losses
from mcit_lightning.towers import Towers
from mcit_lightning.weight_gradients import adding_gradients


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

    The extra memory is one float32 copy of the candidates plus a single gradient (see `adding_gradients`). Samples are weighted
    alike whatever batch or process they are in, so the result does not depend on either, up to rounding.

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
    with adding_gradients(towers.model, parameters, sums, offload=offload), towers.pretrained():
        for batch in batches:
            with context():
                loss = sample_losses(towers.model, batch).sum() / samples
            if loss.requires_grad:
                loss.backward()
    scores = dict.fromkeys(paths, 0.0)
    for key, parameter in parameters.items():
        # a process without a sample, or a tower that no sample reached, has no gradient but takes part in the sum
        total = sums.pop(key, None)
        total = torch.zeros_like(parameter, dtype=torch.float32) if total is None else total.to(parameter.device)
        scores[key[0]] += float(reduce(total).norm())
    return scores
