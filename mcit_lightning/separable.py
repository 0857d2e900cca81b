"""Two groups of experts with a router each, fused by what they answer (SMoLoRA: Wang et al., ICCV 2025).

Shapes: B samples, S tokens, N experts, the first half of which is the first group, R the sum of their ranks, d the layer's input
width, m its output width, e the width of an instruction's embedding.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.gates import GateState, RouterGate, for_beams
from mcit_lightning.joined import float_linear

VISUAL, INSTRUCTION, FUSION = "visual", "instruction", "fusion"
"""Names of a layer's routers: R_vu [N / 2, d], R_if [N / 2, e], and the importance matrices I_vu and I_if, [2, m]."""


@dataclass
class SeparableState(GateState):
    """What the gates and fusions of a model need to know about the batch."""

    instruction: Tensor | None = None
    """[B, e], float32, of the samples' instructions; None where no layer asks."""
    answers: dict[str, Tensor] = field(default_factory=dict)
    """Module path -> [2, R / 2], what the experts' columns add to the scores of their group; kept while generating."""

    def forget(self) -> None:
        """Drop what a generation has decided, and what its weights were."""
        super().forget()
        self.answers.clear()


class SeparableGate(RouterGate):
    """[B, N]: the top k of the visual experts by the mean of the prompt, and the top k of the instruction experts by its text.

        G_vu = softmax(top_k(R_vu Avg(x))),    G_if = softmax(top_k(R_if f(instruction)))

    With `top_k` 1 both are one-hot, whatever the logits are, and nothing is differentiated.

    Args:
        path: the layer's path, under which decisions are filed.
        layer: the layer; it has the routers and an even number of gates.
        top_k: experts per group and sample.
    """

    def __init__(self, path: str, layer: AdapterLinear, top_k: int) -> None:
        super().__init__(path, layer, top_k=top_k, gate_input="mean", normalize=False)

    def _logits(self, z: Tensor, state: GateState) -> Tensor:
        """[B, N] in float32."""
        assert isinstance(state, SeparableState) and state.instruction is not None
        instruction = for_beams(state.instruction, z.shape[0])
        routers = self.layer.routers
        return torch.cat([float_linear(z, routers[VISUAL]), float_linear(instruction, routers[INSTRUCTION])], dim=1)

    def _weights(self, logits: Tensor) -> Tensor:
        groups = logits.unflatten(1, (2, -1))
        assert self.top_k is not None
        top = groups.topk(self.top_k, dim=-1)
        chosen = torch.ones_like(top.values) if self.top_k == 1 else top.values.softmax(-1)
        return torch.zeros_like(groups).scatter(-1, top.indices, chosen).flatten(1)


class AdaptiveFusion:
    """Weighs the two groups against each other for every token, by what they answer.

        [alpha, beta] = softmax([I_vu y_vu, I_if y_if]),    y = alpha y_vu + beta y_if

    y_vu = B_vu h_vu is not made for that: I_vu y_vu = (I_vu B_vu) h_vu, and (I_vu B_vu) has as many numbers as the group has
    columns. Computed in float32.

    Args:
        gate: the layer's gate, whose state it shares.
    """

    def __init__(self, gate: SeparableGate) -> None:
        self.gate = gate

    def __call__(self, hidden: Tensor, b: Sequence[Tensor]) -> Tensor:
        """[..., R], the gated and scaled hidden values [..., R] times their group's weight."""
        device = hidden.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            groups = hidden.float().unflatten(-1, (2, -1))
            weights = (groups * self._answers(b)).sum(-1, keepdim=True).softmax(-2)
            return (groups * weights).flatten(-2).to(hidden.dtype)

    def _answers(self, b: Sequence[Tensor]) -> Tensor:
        """[2, R / 2], I_vu B_vu and I_if B_if."""
        state, path = self.gate.state, self.gate.path
        assert isinstance(state, SeparableState)
        if path in state.answers:
            return state.answers[path]
        columns = torch.cat([part.float() for part in b], dim=1).unflatten(1, (2, -1))  # [m, 2, R / 2]
        answers = torch.einsum("gm,mgr->gr", self.gate.layer.routers[FUSION].float(), columns)
        if state.generating:
            state.answers[path] = answers
        return answers
