"""The random model and tasks that the end-to-end benchmarks run on, and callbacks that note when things happen.

The model has the quickstart's shapes (a ViT-S tower over 36 patches, SmolLM2-135M's decoder) with fewer layers, or those of
LLaVA-1.5-7B, and random weights, so nothing needs to be downloaded and nothing that it answers means anything. Costs do not
depend on the weights.
"""

import contextlib
import io
import json
import random
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from sizes import QUICKSTART, Sizes
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from mcit_lightning import smoke
from mcit_lightning.backbone import load_backbone
from mcit_lightning.checkpoints import read_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.engine import resolve_precision
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.module import MCITModule
from mcit_lightning.quickstart.layout import Sample, Task, write_tasks
from mcit_lightning.runner import run
from mcit_lightning.validation import build_strategy

TASKS = tuple(smoke.QUESTIONS)
PATCH = 14
EVENTS: list[tuple[str, float]] = []
"""What `Clock` has noted: name and `time.perf_counter()`."""


def build(
    folder: Path,
    *,
    layers: int | None = None,
    train: int = 96,
    test: int = 32,
    sizes: Sizes = QUICKSTART,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write model and tasks below a folder; returns it.

    Args:
        layers: of the decoder, in place of what the sizes say.
        train: training rows per task.
        test: test rows per task.
        sizes: of the model.
        dtype: of the weights.
        device: where they are drawn.
    """
    if layers is not None:
        sizes = replace(sizes, text={**sizes.text, "num_hidden_layers": layers})
    write_tasks(folder, (_task(name, train, test, sizes.pixels) for name in TASKS))
    with tempfile.TemporaryDirectory() as tiny:
        smoke.prepare(Path(tiny))
        processor = AutoProcessor.from_pretrained(Path(tiny) / "model")
    processor.image_processor.size = {"shortest_edge": sizes.pixels}
    processor.image_processor.crop_size = {"height": sizes.pixels, "width": sizes.pixels}
    processor.patch_size = PATCH
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(**sizes.vision, image_size=sizes.pixels, patch_size=PATCH)
    text = LlamaConfig(
        **sizes.text,
        tie_word_embeddings=sizes.tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=sizes.tied,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    _name_tokens(folder / "model" / "tokenizer.json", sizes.text["vocab_size"])
    return folder


def _name_tokens(path: Path, size: int) -> None:
    """Give the tokens that the tiny tokenizer lacks a text, so that answers which hold them can be compared."""
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    known = {*vocabulary.values(), *(token["id"] for token in content["added_tokens"])}
    vocabulary.update({f"Ġtoken{number}": number for number in range(size) if number not in known})
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def _task(name: str, train: int, test: int, pixels: int) -> Task:
    generator = random.Random(name)
    labels = ("one", "two", "three", "red", "green", "a yellow circle")

    def draw(count: int) -> list[Sample]:
        samples = []
        for number in range(count):
            picture = Image.frombytes("RGB", (pixels, pixels), generator.randbytes(3 * pixels * pixels))
            question = f"{smoke.QUESTIONS[name]} {'Look again. ' * generator.randrange(4)}Number {number}."
            samples.append(Sample(picture, question, generator.choice(labels)))
        return samples

    splits = {"train": draw(train), "val": draw(2), "test": draw(test)}
    return Task(name, splits, source="noise", licence="none needed", unseen="drawn later")


def experiment(folder: Path, out: Path, *overrides: str) -> ExperimentConfig:
    """A run over the tasks of `build`, with the callbacks that every experiment has and `Clock`."""
    listed = ("StageCost", "BackwardTransfer")
    names = ", ".join(f"{{_target_: callbacks.{name}}}" for name in listed)
    common = [
        f"data.root={folder}",
        "prepare=null",
        f"out={out}",
        "zero_shot=false",
        "data.batch_size=8",
        "data.eval_batch_size=32",
        "data.max_new_tokens=5",
        "backbone.train_projector=false",
        "trainer.precision=auto",
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.enable_progress_bar=false",
        "trainer.log_every_n_steps=10",
        f"callbacks=[{names}, {{_target_: workload.Clock}}, {{_target_: callbacks.StageCheckpoint}}]",
    ]
    return load_config(experiments_dir() / "smoke.yaml", [*common, *overrides])


def quiet_run(config: ExperimentConfig) -> Results:
    """`run` without its tables; `EVENTS` then holds this run alone."""
    EVENTS.clear()
    with contextlib.redirect_stdout(io.StringIO()):
        return run(config)


def trained_module(config: ExperimentConfig, stage: int) -> MCITModule:
    """The model as a run has left it after its stage of that number, from 1 on, for evaluation."""
    backbone = load_backbone(config.backbone, precision=resolve_precision(config.trainer))
    module = MCITModule(backbone, build_strategy(config.strategy), config)
    assert config.out is not None
    module.load_weights(read_checkpoint(Path(config.out) / f"stage_{stage:02d}" / "final.ckpt"))
    return module.eval()


def evaluation_stream(config: ExperimentConfig, module: MCITModule, task: str) -> ContinualDataModule:
    """The stream whose first test loader is that of a task."""
    stream = ContinualDataModule(config, module.processor, module.strategy.stages(config.order))
    stream.evaluate_only([task])
    return stream


class Clock(L.Callback):
    """Notes when stages, batches and evaluations begin and end, in `EVENTS`.

    Args:
        file: write the events there too when a training ends, with the time of the day.
        cpu_time: note this process's CPU time instead.
    """

    def __init__(self, file: str | None = None, cpu_time: bool = False) -> None:
        self.file, self.cpu_time = file, cpu_time

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """`fit` or `test` begins."""
        self._note("setup test" if stage == "test" else "setup fit")

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """`fit` or `test` is over."""
        self._note("teardown test" if stage == "test" else "teardown fit")

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The first batch of a stage is there."""
        if batch_idx == 0:
            self._note("first batch")

    def on_train_batch_end(self, *_: Any) -> None:
        """A micro-batch is done."""
        self._note("batch")

    def on_train_end(self, *_: Any) -> None:
        """A stage is trained."""
        self._note("train end")
        if self.file:
            offset = 0.0 if self.cpu_time else time.time() - time.perf_counter()
            Path(self.file).write_text(json.dumps([(name, at + offset) for name, at in EVENTS]), encoding="utf-8")

    def _note(self, name: str) -> None:
        EVENTS.append((name, time.process_time() if self.cpu_time else CLOCK[0]()))


CLOCK = [time.perf_counter]
"""The clock in use; CPU time on a busy machine."""


@dataclass
class Span:
    """An epoch of training, from the end of its first batch to the end of its last."""

    steps: int
    seconds: float
    tokens: int
    """Without padding."""
    answers: int
    """Tokens that the loss counts."""
    trained: int
    """Parameters."""
    peak: int | None
    """Bytes of the GPU's memory at the highest."""


SPANS: list[Span] = []
"""What `Epochs` has noted."""


class Meter:
    """Counts what is trained from now on; the device is waited for at both ends and never between."""

    def __init__(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.steps, self.tokens, self.answers, self.begin = 0, 0, 0, now()

    def count(self, batch: dict[str, Any]) -> None:
        """A step on this batch was taken."""
        self.steps += 1
        self.tokens += batch["num_tokens"]
        self.answers += batch["targets"].numel()

    def span(self, parameters: Iterable[torch.nn.Parameter]) -> Span:
        """What was counted. Of the parameters, those that train are."""
        seconds = now() - self.begin
        trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        return Span(self.steps, seconds, self.tokens, self.answers, trained, peak)


class Epochs(L.Callback):
    """Notes each epoch in `SPANS`."""

    def __init__(self) -> None:
        self.meter: Meter | None = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is done."""
        if batch_idx == 0:
            self.meter = Meter()
            return
        assert self.meter is not None
        self.meter.count(batch)
        if trainer.is_last_batch:
            SPANS.append(self.meter.span(pl_module.parameters()))


def now() -> float:
    """The clock, when the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return CLOCK[0]()
