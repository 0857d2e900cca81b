"""From reconstruction errors to the experts of each sample. Shapes: B samples, T tasks."""

import torch
from torch import Tensor


class SampleGate:
    """A gate that was decided per sample before the forward, for `AdapterLinear.gate`."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        """[B, E], weights of the layer's branches."""

    def __call__(self, x: Tensor) -> Tensor:
        value = self.value
        assert value is not None, "the strategy's routing context was not entered"
        if value.shape[0] != x.shape[0]:  # generation puts the beams of a sample next to each other
            value = value.repeat_interleave(x.shape[0] // value.shape[0], 0)
        return value


def best_under_threshold(errors: Tensor, threshold: Tensor, top_k: int) -> Tensor:
    """[B, T] in {0, 1}: the `top_k` tasks of lowest error among those whose error is at most their threshold.

    D-MoLE (Ge et al., ICML 2025, Eq. 10-12). A row may be empty: the pretrained model answers.

    Args:
        errors: [B, T].
        threshold: [T].
    """
    known = errors <= threshold
    order = errors.masked_fill(~known, torch.inf).argsort(dim=1, stable=True)[:, :top_k]
    return torch.zeros_like(errors).scatter(1, order, 1.0) * known


def vote(votes: Tensor, share: float) -> Tensor:
    """[T] in {0, 1}, for a whole batch: the task with most votes, and a second one with enough of them.

    As in the released code of D-MoLE, where each sample votes for its best task under the thresholds, if it has one. The result
    depends on the batch.

    Args:
        votes: [T], how many samples voted for each task.
        share: of the votes given, which the second task needs.
    """
    order = votes.argsort(descending=True, stable=True)
    chosen = torch.zeros_like(votes)
    chosen[order[0]] = (votes[order[0]] > 0).to(votes.dtype)
    if len(order) > 1:
        enough = (votes[order[1]] > 0) & (votes[order[1]] >= share * votes.sum())
        chosen[order[1]] = enough.to(votes.dtype)
    return chosen
