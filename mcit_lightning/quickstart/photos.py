"""Tasks from photographs and scans: handwritten digits (scikit-learn) and close-ups (scikit-image)."""

from __future__ import annotations

import random
from collections.abc import Mapping

import numpy as np
from PIL import Image

from mcit_lightning.quickstart.canvas import balanced
from mcit_lightning.quickstart.layout import SPLITS, Sample, Task
from mcit_lightning.quickstart.packages import folder_of

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGITS_QUESTION = "Which digit is written here? Answer with one word."

# Photographs in the scikit-image package that are in the public domain or under CC0.
PHOTOS = {
    "bricks": "brick.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "coins": "coins.png",
    "cat": "chelsea.png",
    "coffee": "coffee.png",
    "stars": "hubble_deep_field.jpg",
    "retina": "retina.jpg",
    "tissue": "ihc.png",
    "rocket": "rocket.jpg",
    "text": "page.png",
    "person": "astronaut.png",
}
PHOTOS_QUESTION = "What is shown in this picture? Answer with one word."


def digits(size: int, counts: Mapping[str, int], seed: int) -> Task:
    """Scans of 8 x 8 pixels; later scans, so mostly other hands, are for testing."""
    from sklearn.datasets import load_digits

    data = load_digits()
    first, last = len(data.images) * 55 // 100, len(data.images) * 65 // 100
    ranges = {"train": range(first), "val": range(first, last), "test": range(last, len(data.images))}
    splits = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}/digits/{split}")
        pools = {word: [i for i in ranges[split] if data.target[i] == digit] for digit, word in enumerate(DIGITS)}
        for pool in pools.values():
            rng.shuffle(pool)
        samples = []
        for word in balanced(list(DIGITS), counts[split], rng):
            pixels = (data.images[pools[word].pop()] * (255 / 16)).astype(np.uint8)
            scan = Image.fromarray(255 - pixels).resize((size, size), Image.Resampling.BICUBIC)
            samples.append(Sample(scan, DIGITS_QUESTION, word))
        splits[split] = samples
    return Task(
        "digits", splits, "scikit-learn load_digits", "BSD-3-Clause, data CC BY 4.0", "other scans, later hands"
    )


def textures(size: int, counts: Mapping[str, int], seed: int) -> Task:
    """Crops of photographs: the left part for training, the right part for testing, nothing in between."""
    folder = folder_of("scikit-image") / "data"
    photos = {label: Image.open(folder / name).convert("RGB") for label, name in PHOTOS.items()}
    columns = {"train": (0.0, 0.56), "val": (0.0, 0.56), "test": (0.58, 1.0)}
    splits = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}/textures/{split}")
        samples = []
        for label in balanced(list(PHOTOS), counts[split], rng):
            crop = _crop(photos[label], columns[split], rng)
            samples.append(Sample(crop.resize((size, size), Image.Resampling.BICUBIC), PHOTOS_QUESTION, label))
        splits[split] = samples
    return Task("textures", splits, "scikit-image data", "public domain or CC0", "another part of each photograph")


def _crop(photo: Image.Image, columns: tuple[float, float], rng: random.Random) -> Image.Image:
    left, right = (round(part * photo.width) for part in columns)
    longest = min(right - left, photo.height)
    side = rng.randint(longest // 3, longest * 2 // 3)
    x, y = rng.randint(left, right - side), rng.randint(0, photo.height - side)
    crop = photo.crop((x, y, x + side, y + side))
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop
