"""The random model and tasks that the end-to-end benchmarks run on, and a callback that notes when things happen.

The model has the quickstart's shapes (a ViT-S tower over 36 patches, SmolLM2-135M's decoder) with fewer layers and random
weights, so nothing needs to be downloaded and nothing that it answers means anything. Costs do not depend on the weights.
"""

import contextlib
import io
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mcit_lightning import smoke
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.quickstart.layout import Sample, Task, write_tasks
from mcit_lightning.runner import run

TASKS = tuple(smoke.QUESTIONS)
PIXELS, PATCH, VOCABULARY = 84, 14, 49_160
EVENTS: list[tuple[str, float]] = []
"""What `Clock` has noted: name and `time.perf_counter()`."""


def build(folder: Path, *, layers: int, train: int = 96, test: int = 32) -> Path:
    """Write model and tasks below a folder; returns it.

    Args:
        layers: of the decoder; SmolLM2-135M has 30.
        train: training rows per task.
        test: test rows per task.
    """
    write_tasks(folder, (_task(name, train, test) for name in TASKS))
    with tempfile.TemporaryDirectory() as tiny:
        smoke.prepare(Path(tiny))
        processor = AutoProcessor.from_pretrained(Path(tiny) / "model")
    processor.image_processor.size = {"shortest_edge": PIXELS}
    processor.image_processor.crop_size = {"height": PIXELS, "width": PIXELS}
    processor.patch_size = PATCH
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=6,
        image_size=PIXELS,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder


def _task(name: str, train: int, test: int) -> Task:
    generator = random.Random(name)
    labels = ("one", "two", "three", "red", "green", "a yellow circle")

    def draw(count: int) -> list[Sample]:
        samples = []
        for number in range(count):
            picture = Image.frombytes("RGB", (PIXELS, PIXELS), generator.randbytes(3 * PIXELS * PIXELS))
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
