"""How a training step and an evaluation batch grow with the number of learnt tasks, and what memory they need.

    python benchmarks/growth.py
    python benchmarks/growth.py --cpu-time --threads 1     # on a machine that is busy with other work

Experts, branches, routers and keys of 1, 5, 10 and 20 tasks are put into the model (random weights). A step is forward, backward
and AdamW on a batch of one task; an evaluation batch is routing, prefill and decoding. All counts run in turn, and ratios are to
one task (for D-MoLE's evaluation and first epoch to five: with one task there is no co-expert). Peak memory is the growth of a process's resident memory from before
the model is built to the end of three steps, each variant in a process of its own, relative to plain LoRA with the same number of
trainable parameters (the nearest rank).
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workload

from mcit_lightning.backbone import Backbone, load_backbone
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.generation import generate_tokens
from mcit_lightning.stages import Stage, sequential_stages
from mcit_lightning.strategies import ContinualStrategy, DMoLE
from mcit_lightning.validation import build_strategy

COUNTS = (1, 5, 10, 20)
STRATEGIES = {
    "dmole": "{name: dmole, rank: 16, alpha: 32, dropout: 0.0, router_epochs: 5, router_minimum: 16}",
    "branchlora": "{name: branchlora, rank: 32, alpha: 64, experts: 8, top_k: 2, dropout: 0.0}",
}
STAGES = sequential_stages([f"task{number:02d}" for number in range(max(COUNTS))])


class Learnt:
    """A model with so many tasks, at the start of the last one's training."""

    def __init__(self, folder: Path, strategy: str, tasks: int) -> None:
        config = workload.experiment(folder, folder / "unused", f"strategy={strategy}", callbacks=NEEDED)
        self.backbone: Backbone = load_backbone(config.backbone)
        self.strategy: ContinualStrategy = build_strategy(config.strategy)
        self.stage: Stage = STAGES[tasks - 1]
        stream = ContinualDataModule(config, self.backbone.processor, sequential_stages(config.order))
        self.strategy.check(self.backbone.towers, STAGES)
        batches = [batch for batch, _ in zip(stream.probe_loader(16), range(2), strict=False)]
        self.model, self.towers = self.backbone.model.eval(), self.backbone.towers
        for stage in STAGES[:tasks]:
            self._grow(stage, batches)
        self.trained = list(self.strategy.trainable(self.towers, self.stage))
        for parameter in self.trained:
            parameter.requires_grad_(True)
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.train_batch: dict[str, Any] = next(iter(stream.train_dataloader()))
        self.train_batch["task"] = [self.stage.name] * len(self.train_batch["id"])
        stream.evaluate_only([config.order[0]])
        self.test_batch: dict[str, Any] = next(iter(stream.test_dataloader()[0]))

    def _grow(self, stage: Stage, batches: list[dict[str, Any]]) -> None:
        if isinstance(self.strategy, DMoLE):
            generator = torch.Generator().manual_seed(stage.index)
            paths = [path for paths in self.strategy.candidates(self.towers).values() for path in paths]
            scores = torch.rand(len(paths), generator=generator) + 0.1
            self.strategy.scores = dict(zip(paths, scores.tolist(), strict=True))
        self.strategy.grow(self.towers, self.strategy.plan(stage, self.towers))
        if self.strategy.router_samples(16):
            features = torch.cat([self.strategy.features(self.towers, batch) for batch in batches])
            noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(stage.index))
            self.strategy.fit_router(stage, features + 0.1 * noise)

    def step(self, *, first_epoch: bool = False) -> None:
        """One optimizer step; in the first epoch D-MoLE looks for each sample's co-expert."""
        if first_epoch and isinstance(self.strategy, DMoLE):
            self.strategy.forget_co_experts()
        self.strategy.train()
        self.model.train()
        with self.strategy.routing(self.towers, self.train_batch, self.stage.name):
            loss = self.strategy.loss(self.model, self.train_batch, self.stage).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def evaluate(self) -> None:
        """Route and answer one batch, as the first time that a task is tested."""
        self.model.eval()
        self.strategy.eval()
        batch = {key: value for key, value in self.test_batch.items() if key != "index"}  # nothing is remembered
        with torch.no_grad(), self.strategy.routing(self.towers, batch, None):
            generate_tokens(self.model, batch["inputs"], 5, end_id=-1)


NEEDED = "".join(
    f"{{_target_: callbacks.{name}}}, "
    for name in ("GradientProbe", "CurriculumRatio", "BudgetReallocation", "RouterSpawn")
)


def timed(clock: Callable[[], float], run: Callable[[], None], repeats: int) -> float:
    """Seconds of one of several calls."""
    begin = clock()
    for _ in range(repeats):
        run()
    return (clock() - begin) / repeats
