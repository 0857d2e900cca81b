"""RegLoRA, the method of SEFE (Chen et al., ICML 2025): new updates keep away from the key elements of earlier ones."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.loss import Batch, LossOutput, answer_loss
from mcit_lightning.plans import FreezeRecord, TaskPlan
from mcit_lightning.snapshots import ParameterTable
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.strategies.task_lora import TaskLoRA
from mcit_lightning.towers import Towers


@dataclass
class RegLoRAConfig(LoRAConfig):
    """The values of the released code."""

    weight: float = 2500.0
    """lambda, of the regularisation."""
    key_fraction: float = 0.02
    """Part of a weight update's elements that are its key elements (M %)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ValueError(f"weight: is {self.weight}, must not be negative")
        if not 0 < self.key_fraction <= 1:
            raise ValueError(f"key_fraction: is {self.key_fraction}, must be in (0, 1]")


@STRATEGIES.register("reglora")
class RegLoRA(TaskLoRA):
    """A LoRA per task, all summed; the new update is kept small where earlier updates are largest.

        L = L_task + weight * mean over modules of mean |(B_t A_t)[K]|,    K = the key elements of all tasks i < t
        K_i = the `key_fraction` of elements of B_i A_i with the largest absolute values, per module

    An element that is a key of several tasks counts as often. As in the released code, B A is taken without the scale alpha / r,
    and earlier updates are part of the weights (there merged, here summed). Left out: SEFE's other half, answer style
    diversification, which is a way to write the training data (`experiments/_base/coin_asd.yaml`).
    """

    Config = RegLoRAConfig
    config: RegLoRAConfig

    def __init__(self, config: RegLoRAConfig) -> None:
        super().__init__(config)
        self.keys = ParameterTable()
        """`<module path>.<task>` -> [k], the flat indices of the key elements."""
        self.tasks: list[str] = []

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The stage's LoRA, and room for its key elements."""
        super().grow(towers, plan)
        if plan.stage not in self.tasks:
            self.tasks.append(plan.stage)
            for path in plan.ranks:
                layer = towers.adapters[path]
                count = max(1, int(self.config.key_fraction * layer.out_features * layer.in_features))
                self.keys[f"{path}.{plan.stage}"] = torch.zeros(count, dtype=torch.int32, device=layer.weight.device)

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Cross-entropy and, from the second stage on, the regularisation."""
        output = answer_loss(model, batch)  # type: ignore[arg-type]
        if stage.index > 0:
            layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, AdapterLinear)}
            size = self.key_size(layers, stage.name)
            output.loss = output.loss + self.config.weight * size
            output.parts["key_elements"] = size
        return output

    def key_size(self, layers: dict[str, AdapterLinear], task: str) -> Tensor:
        """Mean absolute value of the task's update at the key elements of the tasks before it, a scalar."""
        earlier = self.tasks[: self.tasks.index(task)]
        sizes = []
        for path, layer in layers.items():
            update = _update(layer, task).flatten()
            found = [update.index_select(0, self.keys[f"{path}.{before}"]) for before in earlier]
            sizes.append(torch.cat(found).abs().mean())
        return torch.stack(sizes).mean()

    @torch.no_grad()
    def end_task(self, towers: Towers, stage: Stage) -> FreezeRecord | None:
        """Find the key elements of the stage's update."""
        for path, layer in towers.adapters.items():
            update = _update(layer, stage.name).abs().flatten()
            row = self.keys[f"{path}.{stage.name}"]
            row.copy_(update.topk(len(row), sorted=False).indices.sort().values)
        return None


def _update(layer: AdapterLinear, task: str) -> Tensor:
    """[d_out, d_in], B A in float32."""
    with torch.autocast(layer.weight.device.type, enabled=False):
        return layer.lora_b[task].float() @ layer.lora_a[task].float()
