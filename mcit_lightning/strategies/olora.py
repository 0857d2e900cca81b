"""O-LoRA (Wang et al., Findings of EMNLP 2023): tasks are learnt in subspaces that are kept orthogonal to each other."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.loss import Batch, LossOutput, answer_loss
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.strategies.task_lora import TaskLoRA


@dataclass
class OLoRAConfig(LoRAConfig):
    """The paper's loss, with the weights of the released scripts."""

    weight: float = 0.5
    """lambda_1, of the orthogonality."""
    penalty: Literal["squared", "absolute"] = "squared"
    """What is summed over the products of A's rows: their squares (the paper), or their absolute values (the released code)."""
    norm_weight: float = 0.0
    """lambda_2, of the sum of the norms of the task's A and B; only in the released code, 0 to 0.3 there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("weight", "norm_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: is {getattr(self, name)}, must not be negative")


@STRATEGIES.register("olora")
class OLoRA(TaskLoRA):
    """A LoRA per task, all summed; the rows of the new A are pushed to be orthogonal to those of every earlier A.

        L = L_task + weight * sum over modules sum_{i < t} sum_{j, k} (A_i A_t^T)[j, k]^2

    The rows of A_i span the subspace in which task i reads its input, which stands for the gradients of that task. Nothing is
    left out. The projector is shared by all tasks and not protected: `backbone.train_projector=false` freezes it.
    """

    Config = OLoRAConfig
    config: OLoRAConfig

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Cross-entropy and the two regularisers."""
        output = answer_loss(model, batch)  # type: ignore[arg-type]
        layers = [module for module in model.modules() if isinstance(module, AdapterLinear)]
        if stage.index > 0 and self.config.weight:
            overlap = self.overlap(layers, stage.name)
            output.loss = output.loss + self.config.weight * overlap
            output.parts["orthogonality"] = overlap
        if self.config.norm_weight:
            new = [table[stage.name] for layer in layers for table in (layer.lora_a, layer.lora_b)]
            output.loss = output.loss + self.config.norm_weight * torch.stack([value.norm() for value in new]).sum()
        return output

    def overlap(self, layers: list[AdapterLinear], task: str) -> Tensor:
        """How far the task's subspaces are from orthogonal to the earlier ones, a scalar; in float32."""
        terms = []
        for layer in layers:
            with torch.autocast(layer.weight.device.type, enabled=False):
                earlier = torch.cat([a for name, a in layer.lora_a.items() if name != task])
                products = earlier @ layer.lora_a[task].T
            terms.append((products**2 if self.config.penalty == "squared" else products.abs()).sum())
        return torch.stack(terms).sum()
