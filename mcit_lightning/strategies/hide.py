"""HiDe-LLaVA (Guo et al., ACL 2025): task-specific experts in the top layer, one fused LoRA in all layers below."""

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mcit_lightning.loss import Batch
from mcit_lightning.plans import FreezeRecord, TaskPlan
from mcit_lightning.routes import SampleGate
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.keyed_lora import KeyedTaskLoRA
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.towers import Towers

FUSED = "+fused"
"""Name of the branch that answers in the lower layers at evaluation; no task has a name like that."""


@dataclass
class HiDeConfig(LoRAConfig):
    """The values of the released code."""

    temperature: float = 0.1
    """Of the softmax over the tasks' similarities."""
    fusion_weight: float = 1.0
    """Factor of every task's A and of every task's B in the fused ones."""
    top_layers: int = 1
    """Decoder layers, from the last one down, that have task-specific experts."""
    key_encoder: str | None = None
    """A CLIP checkpoint for image and question, as in the paper (`openai/clip-vit-large-patch14-336`); null takes the model's own
    vision tower and input embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature: is {self.temperature}, must be greater than 0")
        if self.top_layers < 0:
            raise ValueError(f"top_layers: is {self.top_layers}, must not be negative")
        if set(self.targets) - {"language"}:
            raise ValueError(f"targets: HiDe-LLaVA adapts the language model alone; got {sorted(self.targets)}")


@STRATEGIES.register("hide")
class HiDeLLaVA(KeyedTaskLoRA):
    """Training: the task's own LoRA in every layer, from its own start. Evaluation, for a sample x:

        top layer:      y = W0 x + s sum_i w_i B_i A_i x,    w = softmax_i((cos(e_img, k_img^i) + cos(e_txt, k_txt^i)) / 2 / tau)
        other layers:   y = W0 x + s (sum_i B_i) (sum_i A_i) x

    The keys k are the means of the embeddings of a task's images and questions. Written after the released code, which fuses A
    and B one by one, so that products of different tasks take part. It differs in two points where that code depends on chance
    or on the batch: keys start empty and not at a random vector that counts as a sample, and a sample's weights are its own, not
    the largest similarities of its batch. Keys are means of embeddings of unit length. Nothing of the method is left out; the
    benchmark of the same paper is `experiments/_base/ucit.yaml`.
    """

    Config = HiDeConfig
    config: HiDeConfig

    def __init__(self, config: HiDeConfig) -> None:
        super().__init__(config)
        self._weights: Tensor | None = None

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """A LoRA in every target, and which of them are in the top layers."""
        plan = super().plan(stage, towers)
        depth = {path: _layer_number(path, towers) for path in plan.ranks}
        first = 1 + max(depth.values()) - self.config.top_layers
        return TaskPlan(stage.name, ranks=plan.ranks, extra={"top": [path for path in depth if depth[path] >= first]})

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The stage's LoRA and keys; with the first stage's, the fused branches below and the gates on top."""
        top = set(plan.extra["top"])
        for path, rank in plan.ranks.items():
            layer = towers.attach(path, scale=self.config.alpha / rank, dropout=self.config.dropout)
            if path not in top:
                layer.add_branch(FUSED, rank, seed=self.seed, path=path)
            elif not isinstance(layer.gate, SampleGate):
                layer.gate = SampleGate()
        super().grow(towers, plan)

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Training: the stage's branch. Evaluation: the fused branch, and on top the branches by the sample's similarities."""
        self._weights = None
        tasks, device = self.selector.tasks, batch["inputs"]["input_ids"].device
        if not tasks:  # before any training: what the first training step would stumble over
            self.key_encoder().check(towers, batch)
            return nullcontext()
        if task is None:
            self._weights = (self.similarities(towers, batch) / self.config.temperature).softmax(1)
            top, below = self._weights, [FUSED]
        else:
            self.collect(towers, batch, task)
            own = torch.tensor([float(name == task) for name in tasks], device=device)
            top, below = own.expand(len(batch["id"]), -1), [task]
        gates: dict[tuple[str, ...], Tensor] = {}
        for layer in towers.adapters.values():
            names = tuple(layer.lora_b)
            if isinstance(layer.gate, SampleGate):
                layer.gate.value = top
            else:
                if names not in gates:
                    gates[names] = torch.tensor([float(name in below) for name in names], device=device)
                layer.gate = gates[names]
        return nullcontext()

    def routed_to(self) -> list[list[str]] | None:
        """All learnt tasks, by the weight of their experts in the top layer."""
        return None if self._weights is None else self.ranked_tasks(self._weights)

    @torch.no_grad()
    def end_task(self, towers: Towers, stage: Stage) -> FreezeRecord | None:
        """Fuse what the tasks so far have learnt in the lower layers."""
        for layer in towers.adapters.values():
            if FUSED in layer.lora_b:
                for table in (layer.lora_a, layer.lora_b):
                    parts = [value for name, value in table.items() if name != FUSED]
                    table[FUSED].copy_(self.config.fusion_weight * torch.stack(parts).sum(0))
        return None


def _layer_number(path: str, towers: Towers) -> int:
    """Number of the decoder layer that a module is in; -1 for one outside of them."""
    found = re.search(r"\.(\d+)\.", path.removeprefix(towers.language))
    return int(found.group(1)) if found else -1
