"""A LoRA per task, and keys by which a sample's task is known without its task id. Not a strategy of its own."""

import torch
from torch import Tensor

from mcit_lightning.clip_keys import CLIPKeyEncoder
from mcit_lightning.data.collate import SampleReader
from mcit_lightning.key_encoders import KeyEncoder, TowerEncoder
from mcit_lightning.loss import Batch
from mcit_lightning.plans import TaskPlan
from mcit_lightning.selector import TaskSelector
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.strategies.task_lora import TaskLoRA
from mcit_lightning.towers import Towers


class KeyedTaskLoRA(TaskLoRA):
    """Collects the mean embedding of each task's images and questions while it trains, and compares samples with it.

    Args:
        config: the method's hyper-parameters.
        key_encoder: a CLIP checkpoint for the embeddings; None takes the model's own vision tower and input embeddings.
    """

    def __init__(self, config: LoRAConfig, key_encoder: str | None) -> None:
        super().__init__(config)
        self.selector = TaskSelector()
        self._encoder_name = key_encoder
        self._encoder: KeyEncoder | None = None

    def check(self, towers: Towers, stages: list[Stage]) -> None:
        """Look for the targets, and load the key encoder. Raises ValueError where one of them is not there."""
        super().check(towers, stages)
        self.key_encoder()

    def key_encoder(self) -> KeyEncoder:
        """What makes the embeddings of the keys; loaded at the first call.

        Raises:
            ValueError: `key_encoder` names no CLIP model.
        """
        if self._encoder is None:
            self._encoder = TowerEncoder() if self._encoder_name is None else CLIPKeyEncoder(self._encoder_name)
        return self._encoder

    def sample_reader(self) -> SampleReader | None:
        """What the key encoder wants to know of the samples."""
        return self.key_encoder().reader

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
