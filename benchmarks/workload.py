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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from mcit_lightning import smoke
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.quickstart.layout import Sample, Task, write_tasks
from mcit_lightning.runner import run

TASKS = tuple(smoke.QUESTIONS)
PATCH = 14
EVENTS: list[tuple[str, float]] = []
"""What `Clock` has noted: name and `time.perf_counter()`."""


@dataclass(frozen=True)
class Shapes:
    """Sizes of a model: what its configurations of tower and decoder are made of, and the side of its pictures."""

    vision: dict[str, Any]
    text: dict[str, Any]
    pixels: int

    def with_layers(self, vision: int, text: int) -> "Shapes":
        """The same with other numbers of layers."""
        return replace(
            self, vision={**self.vision, "num_hidden_layers": vision}, text={**self.text, "num_hidden_layers": text}
        )


QUICKSTART = Shapes(
    {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6},
    {
        "vocab_size": 49_160,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
    pixels=84,
)
LLAVA7B = Shapes(
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    {
        "vocab_size": 32_064,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "tie_word_embeddings": False,
    },
    pixels=336,
)


def build(
    folder: Path,
    *,
    layers: int | None = None,
    train: int = 96,
    test: int = 32,
    shapes: Shapes = QUICKSTART,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Path:
    """Write model and tasks below a folder; returns it.

    Args:
        layers: of the decoder, in place of what the shapes say.
        train: training rows per task.
        test: test rows per task.
        shapes: of the model.
        dtype: of the weights.
        device: where they are drawn.
    """
    if layers is not None:
        shapes = shapes.with_layers(shapes.vision["num_hidden_layers"], layers)
    write_tasks(folder, (_task(name, train, test, shapes.pixels) for name in TASKS))
    with tempfile.TemporaryDirectory() as tiny:
        smoke.prepare(Path(tiny))
        processor = AutoProcessor.from_pretrained(Path(tiny) / "model")
    processor.image_processor.size = {"shortest_edge": shapes.pixels}
    processor.image_processor.crop_size = {"height": shapes.pixels, "width": shapes.pixels}
    processor.patch_size = PATCH
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(**shapes.vision, image_size=shapes.pixels, patch_size=PATCH)
    text = LlamaConfig(
        **shapes.text,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=shapes.text["tie_word_embeddings"],
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    _name_tokens(folder / "model" / "tokenizer.json", shapes.text["vocab_size"])
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


class Epochs(L.Callback):
    """Notes each epoch in `SPANS`. The device is waited for at both ends of an epoch and never between."""

    def __init__(self) -> None:
        self.begin, self.tokens, self.answers = 0.0, 0, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A micro-batch is done."""
        if batch_idx == 0:
            self.begin, self.tokens, self.answers = started(), 0, 0
            return
        self.tokens += batch["num_tokens"]
        self.answers += batch["targets"].numel()
        if trainer.is_last_batch:
            trained = sum(value.numel() for value in pl_module.parameters() if value.requires_grad)
            SPANS.append(finished(self.begin, batch_idx, self.tokens, self.answers, trained))


def started() -> float:
    """Now, when the device has done what it was given; its peak of memory starts anew."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    return CLOCK[0]()


def finished(begin: float, steps: int, tokens: int, answers: int, trained: int) -> Span:
    """The span since then."""
    peak = None
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    return Span(steps, CLOCK[0]() - begin, tokens, answers, trained, peak)
