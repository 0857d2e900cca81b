"""Gates that a router computes from a layer's input: dense per token (MoELoRA), or top-k of one token (BranchLoRA).

Shapes: B samples, S tokens, E branches, T routers, d the layer's input width.
"""

import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal
from weakref import ReferenceType, ref

import torch
import torch.nn.functional as F
from torch import Tensor

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.joined import float_linear

GateInput = Literal["first", "mean", "last", "token"]
"""What a router reads: the first or last real token of the prompt, the mean of its tokens, or each token for itself."""


@dataclass
class GateState:
    """What all gates of a model need to know about the batch; the strategy sets it once per batch."""

    mask: Tensor
    """[B, S], 1 at the real tokens of the prompt."""
    router: str | None = None
    """Name of the router for every sample; None when `choice` says it per sample."""
    choice: Tensor | None = None
    """[B], index of each sample's router among the layer's routers, in the order in which they were added."""
    active: Tensor | None = None
    """[B], 0 for a sample that gets no branch at all (the pretrained model answers), else 1; None for 1 everywhere."""
    generating: bool = False
    """Keep what was decided at the first call (the prefill) for all later ones (decoding)."""
    counting: bool = False
    """Fill `used`."""
    noise: dict[str, Tensor] = field(default_factory=dict)
    """Module path -> [B, E] added to the logits, for all tokens of a sample alike; drawn once per batch, so that recomputation
    sees the same."""
    decided: dict[str, Tensor] = field(default_factory=dict)
    """Module path -> [B, E], the gate that a generation keeps."""
    used: dict[str, Tensor] = field(default_factory=dict)
    """Module path -> [B, E] or [B, S, E], the gate of this batch. A recomputed forward writes the same again, so a batch counts
    once."""
    read: tuple[ReferenceType[Tensor], GateInput, bool, Tensor] | None = None
    """The last tensor that a router read, how, and what it saw; query, key and value have the same input."""

    def forget(self) -> None:
        """Drop what a generation has decided."""
        self.decided.clear()

    def usage(self, path: str) -> Tensor:
        """[2, E] of a module: how often each branch was chosen in this batch, and the sum of its gates.

        Summed over samples, or, of gates per token, over the tokens of the prompts.
        """
        gate = self.used[path]
        if gate.dim() == 3:
            gate = gate * self.mask.unsqueeze(-1)
        gate = gate.flatten(0, -2)
        return torch.stack([(gate > 0).float().sum(0), gate.sum(0)])

    @cached_property
    def first(self) -> tuple[Tensor, Tensor]:
        """Indices (rows [B], columns [B]) of the first token of every prompt."""
        return torch.arange(len(self.mask), device=self.mask.device), self.mask.argmax(1)

    @cached_property
    def last(self) -> tuple[Tensor, Tensor]:
        """Indices (rows [B], columns [B]) of the last token of every prompt."""
        rows, from_right = self.first[0], self.mask.flip(1).argmax(1)
        return rows, self.mask.shape[1] - 1 - from_right


class RouterGate:
    """The gate of one adapter layer, for `AdapterLinear.gate`.

    Logits are computed in float32. With `top_k` the k largest are kept, and all other gates are exactly zero. Nothing is read
    back from the device, and the gate stays dense, so that every branch gets a gradient on every rank.

    Args:
        path: the layer's path, under which noise and decisions are filed.
        layer: the layer.
        top_k: branches per sample; None keeps all (dense).
        renormalize: with `top_k`, the softmax is over the chosen branches, so the magnitude does not depend on E. That is the
            same as a softmax over all, masked and divided by its sum. False leaves out the division.
        gate_input: what the router reads.
        normalize: divide the router's input by its root mean square. The first token of a decoder has activations of
            extreme size, which would saturate the softmax.
    """

    def __init__(
        self,
        path: str,
        layer: AdapterLinear,
        *,
        top_k: int | None,
        gate_input: GateInput,
        normalize: bool,
        renormalize: bool = True,
    ) -> None:
        self.path, self.layer = path, layer
        self.top_k, self.gate_input, self.normalize, self.renormalize = top_k, gate_input, normalize, renormalize
        self.state: GateState | None = None

    def __call__(self, x: Tensor) -> Tensor:
        state = self.state
        assert state is not None, f"{self.path}: the strategy's routing context was not entered"
        per_token = self.gate_input == "token"
        if state.generating and not per_token and self.path in state.decided:
            return state.decided[self.path]
        device = x.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            logits = self._logits(self._input(x, state), state)
            if self.path in state.noise:
                logits = logits + _per_sample(state.noise[self.path], logits)
            gate = self._weights(logits)
            if state.active is not None:
                gate = gate * _per_sample(state.active.unsqueeze(1), gate)
        if state.counting:
            state.used[self.path] = gate.detach()
        if state.generating and not per_token:
            state.decided[self.path] = gate
        return gate

    def _input(self, x: Tensor, state: GateState) -> Tensor:
        """[B, d], or [B, S, d] per token, what the router sees of x."""
        if self.gate_input == "token" and not self.normalize:
            return x
        if state.read is not None and state.read[0]() is x and state.read[1:3] == (self.gate_input, self.normalize):
            return state.read[3]
        z = x.float() if self.gate_input == "token" else self._read(x, state)
        if self.normalize:
            z = F.rms_norm(z, z.shape[-1:], eps=1e-6)
        if x.grad_fn is not None or not z.requires_grad:  # a leaf may be used again after z's graph is gone
            state.read = ref(x), self.gate_input, self.normalize, z
        return z

    def _read(self, x: Tensor, state: GateState) -> Tensor:
        """[B, d] in float32."""
        beams = x.shape[0] // state.mask.shape[0]
        if self.gate_input == "mean":
            weights = for_beams(state.mask, x.shape[0]).to(torch.float32).unsqueeze(-1)
            return (x.float() * weights).sum(1) / weights.sum(1).clamp(min=1)
        rows, columns = state.first if self.gate_input == "first" else state.last
        if beams > 1:
            rows, columns = torch.arange(x.shape[0], device=x.device), columns.repeat_interleave(beams, 0)
        return x[rows, columns].float()

    def _logits(self, z: Tensor, state: GateState) -> Tensor:
        """[B, E], or [B, S, E] per token, in float32; -inf for branches that are younger than the router."""
        branches = self.layer.num_gates
        if state.choice is None:
            assert state.router is not None
            router = self.layer.routers[state.router]
            logits = float_linear(z, router)
            return logits if len(router) == branches else F.pad(logits, (0, branches - len(router)), value=-math.inf)
        routers = list(self.layer.routers.values())
        table = torch.stack(
            [F.pad(router.float(), (0, 0, 0, branches - len(router))) for router in routers]
        )  # [T, E, d]
        choice = for_beams(state.choice, z.shape[0])
        logits = torch.einsum("b...d,bed->b...e", z.float(), table.index_select(0, choice))
        if len(routers[0]) == branches:
            return logits
        known = torch.tensor([len(router) for router in routers], device=z.device).index_select(0, choice)
        young = torch.arange(branches, device=z.device) >= known.unsqueeze(1)
        return logits.masked_fill(young.unsqueeze(1) if logits.dim() == 3 else young, -math.inf)

    def _weights(self, logits: Tensor) -> Tensor:
        if self.top_k is None or self.top_k >= logits.shape[-1]:
            return logits.softmax(-1)
        top = logits.topk(self.top_k, dim=-1)
        chosen = top.values.softmax(-1) if self.renormalize else logits.softmax(-1).gather(-1, top.indices)
        return torch.zeros_like(logits).scatter(-1, top.indices, chosen)


def for_beams(per_sample: Tensor, rows: int) -> Tensor:
    """Repeat rows for beams: generation puts the beams of a sample next to each other."""
    return per_sample if per_sample.shape[0] == rows else per_sample.repeat_interleave(rows // per_sample.shape[0], 0)


def _per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B, n] for the rows of `like`: as it is for [B, E], and for every token of a row alike for [B, S, E]."""
    values = for_beams(values, like.shape[0])
    return values.unsqueeze(1) if like.dim() == 3 else values
