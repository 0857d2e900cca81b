"""A whole training step of the framework against a bare PyTorch loop with PEFT's LoRA: same model, data and batches.

    python benchmarks/training_step.py
    python benchmarks/training_step.py --cpu-time --threads 1     # on a machine that is busy with other work

The framework's side is an ordinary run of the `sequential` strategy (Lightning, logging to TensorBoard, callbacks, its own
adapter layer); the bare loop reads the same batches from the same loader, computes the same loss on answer tokens, clips, steps
AdamW and a schedule. A third variant is the loop as it is usually written, with logits for every position. The time is that of
a block of steps after the first, data loading included. Without `peft` the bare loop uses the framework's adapter layer.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import workload
from lightning.fabric.utilities import move_data_to_device
from ratios import HAS_PEFT, in_turn, parser, prepare, ratio_row, report
from torch import nn

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.engine import resolve_precision
from mcit_lightning.loss import answer_loss
from mcit_lightning.stages import sequential_stages
from mcit_lightning.towers import ALL_LINEAR

RANK = 16


class BareLoop:
    """Model, loader and optimizer of a training loop without any framework."""

    def __init__(self, config: ExperimentConfig, *, all_logits: bool, rank: int = RANK, device: str = "cpu") -> None:
        precision = resolve_precision(config.trainer)
        backbone = load_backbone(config.backbone, precision=precision)
        self.model, self.all_logits, self.config = backbone.model, all_logits, config
        self.context = precision == "bf16-mixed"
        self.stream = ContinualDataModule(config, backbone.processor, sequential_stages(config.order))
        paths = list(backbone.towers.targets("language", [ALL_LINEAR]))
        if HAS_PEFT:
            from peft import LoraConfig, get_peft_model

            get_peft_model(self.model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=paths))
        else:
            for path in paths:
                backbone.towers.attach(path, scale=2.0).add_branch("lora", rank, seed=0, path=path)
        self.model.to(device).train()
        self.trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def block(self, clock: Callable[[], float], steps: int) -> float:
        """Seconds per step, of the steps after the first."""
        workload.CLOCK[0] = clock
        span = self.span(steps)
        return span.seconds / span.steps

    def span(self, steps: int) -> workload.Span:
        """Train so many steps; the span is that of those after the first."""
        optimizer = torch.optim.AdamW(self.trained, lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        meter: workload.Meter | None = None
        for batch in self._batches(steps):
            with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.context):
                loss = self._loss(batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if meter is None:
                meter = workload.Meter()
            else:
                meter.count(batch)
        assert meter is not None
        return meter.span(self.trained)

    def _loss(self, batch: dict[str, Any]) -> torch.Tensor:
        if not self.all_logits:
            return answer_loss(self.model, batch).loss
        labels = torch.full_like(batch["inputs"]["input_ids"], -100).flatten()
        labels[batch["positions"] + 1] = batch["targets"]
        return self.model(**batch["inputs"], labels=labels.view_as(batch["inputs"]["input_ids"])).loss

    def _batches(self, steps: int) -> Iterator[dict[str, Any]]:
        for _, batch in zip(range(steps), self.stream.train_dataloader(), strict=False):
            yield move_data_to_device(batch, self.model.device)


def framework_block(folder: Path, clock: Callable[[], float], steps: int) -> float:
    """Seconds per step of a run, of the steps after the first."""
    workload.CLOCK[0] = clock
    with tempfile.TemporaryDirectory() as out:
        workload.quiet_run(config_of(folder, Path(out) / "run", steps))
    ends = [at for name, at in workload.EVENTS if name == "batch"]
    assert len(ends) == steps
    return (ends[-1] - ends[0]) / (steps - 1)


def config_of(folder: Path, out: Path, steps: int) -> ExperimentConfig:
    """A run of one task with so many steps."""
    strategy = f"strategy={{name: sequential, rank: {RANK}, alpha: {2 * RANK}}}"
    sizes = (f"data.limit_train={8 * steps}", "data.limit_test=2", "order=[colours]")
    return workload.experiment(folder, out, strategy, *sizes)


def measure(options: argparse.Namespace) -> None:
    """Run the benchmark."""
    clock = prepare(options)
    with tempfile.TemporaryDirectory() as name:
        folder = workload.build(Path(name), layers=options.layers, train=8 * options.steps, test=2)
        config = config_of(folder, folder / "unused", options.steps)
        same, usual = BareLoop(config, all_logits=False), BareLoop(config, all_logits=True)
        variants = {
            "framework": lambda: framework_block(folder, clock, options.steps),
            "bare loop": lambda: same.block(clock, options.steps),
            "bare loop, all logits": lambda: usual.block(clock, options.steps),
        }
        samples = in_turn(variants, options.rounds)
    base = "bare loop with PEFT LoRA" if HAS_PEFT else "bare loop (peft is not installed: own adapter layer)"
    rows = [
        ratio_row("framework", "bare loop", samples, base=base, name="training step", target="<= 1.05"),
        ratio_row(
            "framework", "bare loop, all logits", samples, name="training step", base=f"{base}, logits everywhere"
        ),
    ]
    report(f"training step, {options.layers} decoder layers, batch 8", rows, options)


if __name__ == "__main__":
    arguments = parser(__doc__, rounds=7)
    arguments.add_argument("--layers", type=int, default=10, help="of the decoder; SmolLM2-135M has 30")
    arguments.add_argument("--steps", type=int, default=13, help="per block")
    measure(arguments.parse_args())
