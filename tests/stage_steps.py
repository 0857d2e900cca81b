"""A strategy's stages without a Trainer: the hooks in their order, a few AdamW steps between them."""

from collections.abc import Callable
from typing import Any

import torch

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import Stage
from mcit_lightning.validation import build_strategy

TASKS = ["colours", "shapes", "counts"]


class Steps:
    """A module and its stream, driven by hand.

    Args:
        config: the experiment; its strategy has one stage per task.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        strategy = build_strategy(config.strategy)
        self.stages: list[Stage] = strategy.stages(TASKS)
        self.module = MCITModule(load_backbone(config.backbone), strategy, config)
        self.stream = ContinualDataModule(config, self.module.processor, self.stages)
        self.stream.replay = strategy.replay
        self.strategy: Any = strategy
        self.towers = self.module.towers

    def start(self, index: int) -> Stage:
        """What happens before a stage's training."""
        stage = self.stages[index]
        self.stream.stage = index
        self.module.grow(self.strategy.plan(stage, self.towers))
        self.module.requires_grad_(False)
        self.module.eval()
        samples = self.strategy.preview_samples(self.stream.train_rows)
        if samples:
            for batch in self.stream.probe_loader(samples):
                self.strategy.preview(self.towers, batch, stage)
        self.strategy.begin_task(self.towers, stage)
        trained = list(self.strategy.trainable(self.towers, stage))
        if self.strategy.tunes_projector:
            trained += [p for path in self.towers.projector for p in self.module.model.get_submodule(path).parameters()]
        for parameter in trained:
            parameter.requires_grad_(True)
        self.module.train()
        return stage

    def loss(self, batch: dict[str, Any], stage: Stage) -> Any:
        with self.strategy.routing(self.towers, batch, stage.name):
            return self.strategy.loss(self.module.model, batch, stage)

    def train(self, stage: Stage, steps: int = 2, lr: float = 1e-2) -> list[float]:
        """Losses of the first batches of an epoch."""
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=lr)
        losses = []
        for _, batch in zip(range(steps), self.stream.train_dataloader(), strict=False):
            optimizer.zero_grad()
            output = self.loss(batch, stage)
            output.loss.backward()
            optimizer.step()
            losses.append(float(output.loss.detach()))
        return losses

    def end(self, stage: Stage) -> None:
        """What happens after it."""
        self.module.eval()
        samples = self.strategy.review_samples(self.stream.train_rows)
        if samples:
            for batch in self.stream.probe_loader(samples, self.strategy.review_batch_size):
                self.strategy.review(self.towers, batch, stage)
        record = self.strategy.end_task(self.towers, stage)
        if record is not None:
            self.module.freeze_branches(record)

    def learn(self, stages: int, *, steps: int = 2) -> "Steps":
        """Some stages from beginning to end."""
        for index in range(stages):
            stage = self.start(index)
            self.train(stage, steps)
            self.end(stage)
        return self


Make = Callable[..., Steps]
"""`make(strategy, **changes)`: the fixture `steps`."""
