"""A random tiny model and three generated tasks, for tests: the real classes and file formats within a second."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw

from mcit_lightning.quickstart.cache import build_once
from mcit_lightning.quickstart.layout import Sample, Task, llava_processor, write_tasks

if TYPE_CHECKING:
    from transformers import LlavaConfig, LlavaProcessor

SIZE = 30
PATCH = 10
COUNTS = {"train": 24, "val": 8, "test": 8}

COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220), "yellow": (240, 210, 40)}
SHAPES = ("circle", "square", "triangle", "cross")
NUMBERS = ("one", "two", "three", "four")
QUESTIONS = {
    "colours": "Which colour is this? Answer with one word.",
    "shapes": "Which shape is this? Answer with one word.",
    "counts": "How many dots are there? Answer with one word.",
}


def prepare(root: Path, seed: int = 0) -> None:
    """Write the model to `root/model` and the tasks `colours`, `shapes` and `counts` beside it, once.

    Same layout as `mcit_lightning.quickstart.prepare`. The model is random, so nothing it answers means anything.
    """
    fingerprint = {"what": "smoke", "revision": 1, "seed": seed}
    build_once(Path(root), fingerprint, lambda folder: _build(folder, seed))


def _build(folder: Path, seed: int) -> None:
    write_tasks(folder, _tasks(seed))
    _write_model(folder / "model", seed)


def _tasks(seed: int) -> Iterator[Task]:
    draws: dict[str, tuple[tuple[str, ...], Callable[[ImageDraw.ImageDraw, str, random.Random], None]]] = {
        "colours": (tuple(COLOURS), lambda draw, label, rng: _shape(draw, rng.choice(SHAPES), COLOURS[label], rng)),
        "shapes": (SHAPES, lambda draw, label, rng: _shape(draw, label, rng.choice(list(COLOURS.values())), rng)),
        "counts": (NUMBERS, lambda draw, label, rng: _dots(draw, NUMBERS.index(label) + 1, rng)),
    }
    for name, (labels, paint) in draws.items():
        splits = {}
        for split, count in COUNTS.items():
            rng = random.Random(f"{seed}/{name}/{split}")
            answers = [labels[index % len(labels)] for index in range(count)]
            rng.shuffle(answers)
            splits[split] = [Sample(_paint(paint, label, rng), QUESTIONS[name], label) for label in answers]
        yield Task(name, splits, source="generated", licence="none needed", unseen="drawn with other random numbers")


def _paint(
    paint: Callable[[ImageDraw.ImageDraw, str, random.Random], None], label: str, rng: random.Random
) -> Image.Image:
    shade = rng.randrange(200, 256)
    picture = Image.new("RGB", (SIZE, SIZE), (shade, shade, shade))
    paint(ImageDraw.Draw(picture), label, rng)
    return picture


def _shape(draw: ImageDraw.ImageDraw, shape: str, fill: tuple[int, int, int], rng: random.Random) -> None:
    left, top, side = rng.randrange(1, 9), rng.randrange(1, 9), rng.randrange(13, 20)
    box = (left, top, left + side, top + side)
    if shape == "circle":
        draw.ellipse(box, fill=fill)
    elif shape == "square":
        draw.rectangle(box, fill=fill)
    elif shape == "triangle":
        draw.polygon([(left, top + side), (left + side, top + side), (left + side // 2, top)], fill=fill)
    else:
        draw.line([(left, top), (left + side, top + side)], fill=fill, width=4)
        draw.line([(left, top + side), (left + side, top)], fill=fill, width=4)


def _dots(draw: ImageDraw.ImageDraw, count: int, rng: random.Random) -> None:
    cells = rng.sample([(column, row) for column in range(3) for row in range(3)], count)
    for column, row in cells:
        left, top = 10 * column + rng.randrange(1, 4), 10 * row + rng.randrange(1, 4)
        draw.ellipse((left, top, left + 5, top + 5), fill=(20, 20, 20))


def _write_model(folder: Path, seed: int) -> None:
    # torch and transformers take seconds to import, which a caller whose cache is ready should not pay.
    import torch
    from transformers import LlavaForConditionalGeneration

    processor = _processor()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(_config(processor))
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    model.generation_config.pad_token_id = processor.tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _processor() -> LlavaProcessor:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessorPil, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [*QUESTIONS.values(), *COLOURS, *SHAPES, *NUMBERS, "user\n", "assistant\n"]
    bpe.train_from_iterator(texts * 4, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return llava_processor(images, tokenizer, PATCH)


def _config(processor: LlavaProcessor) -> LlavaConfig:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=SIZE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(processor.tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=processor.tokenizer.image_token_id)
