"""Placing a drawing on a square canvas a little differently each time, so that no two samples are the same picture."""

from __future__ import annotations

import random

from PIL import Image

Colour = tuple[int, int, int]


def pale(rng: random.Random) -> Colour:
    """A light background."""
    return (rng.randrange(205, 256), rng.randrange(205, 256), rng.randrange(205, 256))


def dark(rng: random.Random) -> Colour:
    """A dark ink."""
    return (rng.randrange(0, 110), rng.randrange(0, 110), rng.randrange(0, 110))


def place(
    drawing: Image.Image,
    size: int,
    rng: random.Random,
    background: Colour,
    scale: tuple[float, float] = (0.7, 0.98),
    turn: float = 12.0,
    flip: bool = False,
) -> Image.Image:
    """Put a transparent drawing on a plain square of `size` pixels.

    Args:
        drawing: Any picture; its alpha channel decides where the background shows.
        size: Side of the result in pixels.
        rng: Draws scale, angle, position and mirroring.
        background: Colour of the square.
        scale: Range of the drawing's longer side relative to the square.
        turn: Largest rotation in degrees, to either side.
        flip: Whether half of the results are mirrored. Leave it off where left and right carry meaning.
    """
    drawing = drawing.convert("RGBA")
    if flip and rng.random() < 0.5:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    factor = rng.uniform(*scale) * size / max(drawing.size)
    drawing = drawing.resize(
        (max(1, round(drawing.width * factor)), max(1, round(drawing.height * factor))), Image.Resampling.LANCZOS
    )
    drawing = drawing.rotate(rng.uniform(-turn, turn), Image.Resampling.BICUBIC, expand=True)
    spare_x, spare_y = size - drawing.width, size - drawing.height
    left = rng.randint(0, spare_x) if spare_x > 0 else spare_x // 2
    top = rng.randint(0, spare_y) if spare_y > 0 else spare_y // 2
    canvas = Image.new("RGB", (size, size), background)
    canvas.paste(drawing, (left, top), drawing)
    return canvas


def balanced(labels: list[str], count: int, rng: random.Random) -> list[str]:
    """`count` labels in random order, each as often as any other (give or take one), and so in every beginning of it."""
    answers: list[str] = []
    while len(answers) < count:
        answers += rng.sample(labels, len(labels))
    return answers[:count]
