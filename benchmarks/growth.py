"""How a training step and an evaluation batch grow with the number of learnt tasks, and what memory they need.

    python benchmarks/growth.py
    python benchmarks/growth.py --cpu-time --threads 1     # on a machine that is busy with other work

Experts, branches, routers and keys of 1, 5, 10 and 20 tasks are put into the model (random weights). A step is forward, backward
and AdamW on a batch of one task; an evaluation batch is routing, prefill and decoding of a batch that was not seen before. All
counts run in turn. Peak memory (on Linux) is how much a process's resident memory grows from before the model is built to its
highest in three steps, each variant in a process of its own, relative to plain LoRA with about as many trainable parameters. Its
note says what of it is stored: experts and branches that do not train, keys and autoencoders. A last row counts that for D-MoLE
at the shapes of LLaVA-1.5-7B.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import workload
import yaml
from dmole import build
from ratios import Row, in_turn, parser, prepare, ratio_row, report
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
)

from mcit_lightning.backbone import Backbone, load_backbone
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.generation import generate_tokens
from mcit_lightning.stages import Stage, sequential_stages
from mcit_lightning.strategies import ContinualStrategy, DMoLE, DMoLEConfig
from mcit_lightning.towers import ALL_LINEAR, Towers, find_targets
from mcit_lightning.validation import build_strategy

COUNTS = (1, 5, 10, 20)
STRATEGIES = {
    "dmole": "{name: dmole, rank: 16, alpha: 32, dropout: 0.0, router_epochs: 5, router_minimum: 16}",
    "branchlora": "{name: branchlora, rank: 32, alpha: 64, experts: 8, top_k: 2, dropout: 0.0}",
}
COMPARED: dict[str, dict[str, list[str]]] = {
    "dmole": DMoLEConfig().targets,  # backward passes through both towers
    "branchlora": {"language": [ALL_LINEAR]},
}
"""Linears that the plain LoRA adapts which a strategy's memory is compared with."""
STAGES = sequential_stages([f"task{number:02d}" for number in range(max(COUNTS))])


class Learnt:
    """A model with so many tasks, at the start of the last one's training."""

    def __init__(self, folder: Path, strategy: str, tasks: int) -> None:
        config = workload.experiment(folder, folder / "unused")
        self.backbone: Backbone = load_backbone(config.backbone)
        self.strategy: ContinualStrategy = build_strategy(yaml.safe_load(strategy))
        self.stage: Stage = STAGES[tasks - 1]
        stream = ContinualDataModule(config, self.backbone.processor, sequential_stages(config.order))
        self.strategy.check(self.backbone.towers, STAGES)
        batches = [batch for batch, _ in zip(stream.probe_loader(16), range(2), strict=False)]
        self.model, self.towers = self.backbone.model.eval(), self.backbone.towers
        self._features: torch.Tensor | None = None
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
            if self._features is None:  # of the pretrained model: the same for all tasks, so they get noise
                self._features = torch.cat([self.strategy.features(self.towers, batch) for batch in batches])
            features = self._features
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
            generate_tokens(self.model, self.strategy.inputs(batch), 5, end_id=-1)


def timed(clock: Callable[[], float], run: Callable[[], None], repeats: int) -> float:
    """Seconds of one of several calls."""
    begin = clock()
    for _ in range(repeats):
        run()
    return (clock() - begin) / repeats


def times(options: argparse.Namespace, folder: Path, clock: Callable[[], float]) -> list[Row]:
    """Rows of one strategy after another."""
    rows = []
    for name, node in STRATEGIES.items():
        learnt = {count: Learnt(folder, node, count) for count in options.tasks}
        kinds: dict[str, Callable[[Learnt], None]] = {"training step": Learnt.step, "evaluation batch": Learnt.evaluate}
        if name == "dmole":
            kinds["training step, first epoch"] = lambda model: model.step(first_epoch=True)
        for kind, call in kinds.items():
            for model in learnt.values():
                call(model)
            variants = {
                str(count): lambda model=model, call=call: timed(clock, lambda: call(model), options.repeats)
                for count, model in learnt.items()
            }
            samples = in_turn(variants, options.rounds)  # type: ignore[arg-type]
            for count in options.tasks[1:]:
                target = "<= 1.15" if count == max(COUNTS) and kind == "training step" else ""
                what = f"{name}: {kind}, {count} tasks"
                rows.append(ratio_row(str(count), "1", samples, name=what, base="1 task", target=target))
    return rows


def memory(options: argparse.Namespace, folder: Path) -> list[Row]:
    """Rows of peak memory relative to plain LoRA of equal size."""
    rows = []
    for name in STRATEGIES:
        counts = (1, max(options.tasks))
        samples: dict[int, list[tuple[dict[str, int], dict[str, int]]]] = {count: [] for count in counts}
        for _ in range(options.memory_rounds):
            plain: dict[int, dict[str, int]] = {}  # by size: tasks of equal size are compared with one process
            for count in counts:
                own = _child(options, folder, name, count, None)
                size = own["trainable"]
                plain[size] = plain.get(size) or _child(options, folder, name, count, size)
                samples[count].append((own, plain[size]))
        for count, found in samples.items():
            ratios = sorted(own["bytes"] / lora["bytes"] for own, lora in found)
            rest = statistics.median((own["bytes"] - own["stored"]) / lora["bytes"] for own, lora in found)
            own, lora = found[0]
            rows.append(
                Row(
                    f"{name}: peak memory, {count} task(s)",
                    f"LoRA, {lora['trainable']:,} for {own['trainable']:,} parameters",
                    statistics.median(ratios),
                    ratios[0],
                    ratios[-1],
                    statistics.median(own["bytes"] for own, _ in found) / 2**20,
                    "MiB",
                    "<= 1.05",
                    f"{own['stored'] / 2**20:.0f} MiB stored, without it {rest:.2f}",
                )
            )
    return rows


def counted(tasks: int) -> Row:
    """Memory of D-MoLE after so many tasks relative to plain LoRA of equal size, by count, at the shapes of LLaVA-1.5-7B.

    The base in bfloat16, experts, autoencoders, gradients and Adam's moments in float32, rank 8 on the attention of both towers,
    as in `experiments/dmole_llava7b.yaml`. Activations, which both have alike, are left out: with them the ratio is smaller.
    """
    with torch.device("meta"):
        model, of_tower = build("llava7b", divide=1)
    towers, stage = Towers.of(model), STAGES[0]
    names = {"vision": of_tower, "language": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    strategy = DMoLE(DMoLEConfig(rank=8, alpha=16, targets=names))
    paths = [path for own in strategy.candidates(towers).values() for path in own]
    strategy.scores = dict.fromkeys(paths, 1.0)
    base = sum(parameter.numel() for parameter in model.parameters())
    strategy.grow(towers, strategy.plan(stage, towers))
    assert strategy.bank is not None
    expert = sum(parameter.numel() for parameter in strategy.trainable(towers, stage))
    autoencoder = sum(tensor.numel() for tensor in strategy.bank.buffers())
    lora = 2 * base + (4 + 4 + 8) * expert
    stored = 4 * ((tasks - 1) * expert + tasks * autoencoder)
    ratio, gib = (lora + stored) / lora, 2**30
    return Row(
        f"dmole: memory by count, {tasks} tasks, LLaVA-1.5-7B",
        f"LoRA of {expert:,} parameters",
        ratio,
        ratio,
        ratio,
        (lora + stored) / gib,
        "GiB",
        "<= 1.05",
        f"{stored / gib:.2f} GiB stored beside {lora / gib:.2f}",
    )


def _child(options: argparse.Namespace, folder: Path, name: str, tasks: int, trainable: int | None) -> dict[str, int]:
    """`child` in a new process: forked from one that has only imported what this file imports, once.

    It gives back what it frees, so that holes in its heap do not count as used.
    """
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)  # of glibc
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        return pool.apply(child, (options, folder, name, tasks, trainable))


def child(options: argparse.Namespace, folder: Path, name: str, tasks: int, trainable: int | None) -> dict[str, int]:
    """Bytes that one variant needs; runs in a process of its own.

    Args:
        trainable: measure plain LoRA with about so many parameters instead.
    """
    prepare(options)
    before = _resident("VmRSS")
    node = STRATEGIES[name]
    if trainable is not None:  # plain LoRA instead
        rank = max(1, round(trainable / lora_parameters(folder, COMPARED[name])))
        lora = {"name": "sequential", "rank": rank, "alpha": 2 * rank, "targets": COMPARED[name]}
        node, tasks = json.dumps(lora), 1
    model = Learnt(folder, node, tasks)
    for _ in range(3):
        model.step()
    trained = {id(parameter) for parameter in model.trained}
    adapters = (value for layer in model.towers.adapters.values() for _, value in layer.adapter_parameters())
    kept = [*adapters, *model.strategy.parameters(), *model.strategy.buffers()]
    return {
        "bytes": _resident("VmHWM") - before,
        "trainable": sum(parameter.numel() for parameter in model.trained),
        "stored": sum(tensor.numel() * tensor.element_size() for tensor in kept if id(tensor) not in trained),
    }


def _resident(field: str) -> int:
    """Bytes of this process's memory now (`VmRSS`) or at its highest (`VmHWM`). `ru_maxrss` would begin with the parent's."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(f"{field}:")))


def lora_parameters(folder: Path, targets: dict[str, list[str]]) -> int:
    """Parameters of plain LoRA per unit of its rank."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder / "model"))
    linears = (model.get_submodule(path) for path in find_targets(Towers.of(model), targets))
    return sum(linear.in_features + linear.out_features for linear in linears)


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark."""
    clock = prepare(options)
    with tempfile.TemporaryDirectory() as name:
        folder = workload.build(Path(name), layers=options.layers, train=32, test=16)
        rows = [*times(options, folder, clock), *memory(options, folder), counted(max(options.tasks))]
    report(f"growth with the number of tasks, {options.layers} decoder layers, batch 8", rows, options)


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--layers", type=int, default=6, help="of the decoder; SmolLM2-135M has 30")
    arguments.add_argument(
        "--tasks", type=int, nargs="+", default=list(COUNTS), help="numbers of learnt tasks, from 1 on"
    )
    arguments.add_argument("--repeats", type=int, default=2, help="steps of a count in a round")
    arguments.add_argument("--memory-rounds", type=int, default=3)
    measure(arguments.parse_args())
