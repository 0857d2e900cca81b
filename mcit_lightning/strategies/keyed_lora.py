"""A LoRA per task, and keys by which a sample's task is known without its task id. Not a strategy of its own."""

import torch
from torch import Tensor

from mcit_lightning.loss import Batch
from mcit_lightning.plans import TaskPlan
from mcit_lightning.selector import TaskSelector
from mcit_lightning.strategies.key_encoded import KeyEncoded
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.strategies.task_lora import TaskLoRA
from mcit_lightning.towers import Towers


class KeyedTaskLoRA(KeyEncoded, TaskLoRA):
    """Collects the mean embedding of each task's images and questions while it trains, and compares samples with it.

    Args:
        config: the method's hyper-parameters, `key_encoder` among them.
    """

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__(config)
        self.selector = TaskSelector()

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The stage's LoRA and keys."""
        super().grow(towers, plan)
        self.selector.add_task(plan.stage, *self.key_encoder().widths(towers), towers.model.device)

    def collect(self, towers: Towers, batch: Batch, task: str) -> None:
        """Add a training batch to the task's keys, those of all ranks. Collective; does nothing in validation."""
        if self.training:
            self.selector.update(task, *self.key_encoder().embed(towers, batch))

    def similarities(self, towers: Towers, batch: Batch, *, question_only: bool = False) -> Tensor:
        """[B, T], cosine to each learnt task's keys, in float32: the mean of image and question, or what a sample has of them."""
        image, has_image, text = self.key_encoder().embed(towers, batch)
        has_image = torch.zeros_like(has_image) if question_only else has_image
        return self.selector.scores(image, has_image, text) / (1 + has_image).unsqueeze(1)

    def ranked_tasks(self, weights: Tensor) -> list[list[str]]:
        """For each sample the learnt tasks of weight above zero, by falling weight.

        Args:
            weights: [B, T].
        """
        order = torch.argsort(weights, dim=1, descending=True, stable=True).tolist()
        counts = (weights > 0).sum(1).tolist()
        return [[self.selector.tasks[index] for index in row[:count]] for row, count in zip(order, counts, strict=True)]
