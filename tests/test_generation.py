"""Batched, cached generation gives the tokens of batch size one, for every strategy."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mcit_lightning.backbone import load_backbone
from mcit_lightning.checkpoints import read_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.collate import EvalCollator
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.data.records import Sample
from mcit_lightning.generation import generate_tokens
from mcit_lightning.module import MCITModule
from mcit_lightning.runner import run
from mcit_lightning.strategies import STRATEGIES
from mcit_lightning.validation import build_strategy

CALLBACKS = (
    "GradientProbe",
    "CurriculumRatio",
    "BudgetReallocation",
    "RouterSpawn",
    "TaskPreview",
    "BranchFreeze",
    "RouterTuning",
    "Consolidate",
)
"""Of the strategies, in the order in which they run."""


def callback_list(name: str) -> str:
    """The override that names what a strategy needs."""
    needed = set(build_strategy({"name": name}).required_callbacks())
    if name == "branchlora":
        needed.add("RouterSpawn")
    assert needed <= set(CALLBACKS), f"name {needed - set(CALLBACKS)} in CALLBACKS, at its place"
    chosen = [*(callback for callback in CALLBACKS if callback in needed), "BackwardTransfer", "StageCheckpoint"]
    return f"callbacks=[{', '.join(f'{{_target_: callbacks.{callback}}}' for callback in chosen)}]"


def answers(module: MCITModule, samples: list[Sample], size: int) -> dict[tuple[str, str], tuple[Any, Any]]:
    """(task, row) -> tokens and route, in batches of a size."""
    collate = EvalCollator(module.processor, module.config.prompt)
    collate.reader = getattr(module.strategy, "sample_reader", lambda: None)()
    found = {}
    for start in range(0, len(samples), size):
        batch = collate(samples[start : start + size])
        with module.strategy.routing(module.towers, batch, None):
            tokens = generate_tokens(module.model, module.strategy.inputs(batch), 6, end_id=-1).tolist()
        routes = module.strategy.routed_to() or [None] * len(tokens)
        for task, name, answer, route in zip(batch["task"], batch["id"], tokens, routes, strict=True):
            found[task, name] = (tuple(answer), route)
    return found


def mixed_samples(stream: ContinualDataModule) -> list[Sample]:
    """Rows of all tasks in turn, with questions of different lengths and one without an image."""
    rows = zip(*(list(stream.split(task, "test"))[:4] for task in stream.config.order), strict=True)
    samples = [sample for group in rows for sample in group]
    for index, sample in enumerate(samples):
        text = sample.turns[0][1] + " please" * (index * 5 % 7)
        samples[index] = replace(sample, turns=(("user", text),), images=() if index == 3 else sample.images)
    return samples


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_answers_are_those_of_batch_size_one(
    name: str, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    smaller = ("zero_shot=false", "order=[colours,shapes]")
    config = experiment(tmp_path / "run", f"strategy={{name: {name}}}", callback_list(name), *smaller)
    run(config)
    # a new module from the last checkpoint: nothing that the run remembers can help
    module = MCITModule(load_backbone(config.backbone), build_strategy(config.strategy), config)
    stages = module.strategy.stages(config.order)
    if stages:
        module.load_weights(read_checkpoint(tmp_path / "run" / stages[-1].folder / "final.ckpt"))
    module.eval()
    torch.manual_seed(0)
    for parameter in module.model.parameters():  # a random model's answers hardly depend on what it is asked
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    samples = mixed_samples(ContinualDataModule(config, module.processor, stages))
    batched = answers(module, samples, 5)
    module.strategy._tested = {}  # D-MoLE's features of test samples: computed anew
    assert answers(module, samples, 1) == batched and len(batched) == 8
    assert len({tokens for tokens, _ in batched.values()}) > 3, "the answers must differ for this to show anything"
