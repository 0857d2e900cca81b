"""The accuracy matrix as a picture, for TensorBoard. Drawn with Pillow alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mcit_lightning.evaluation.colours import ink, score_colour
from mcit_lightning.evaluation.transfer import TransferMatrix

CELL = (84, 40)
MARGIN = 12
TEXT = (23, 27, 33)


def matrix_image(matrix: TransferMatrix) -> NDArray[np.uint8]:
    """Draw the heat-map with its values.

    Returns: An array of shape [height, width, 3]: a row per stage, the zero-shot row on top if there is one, a column
        per task.
    """
    rows = [(task, scores) for task, scores in zip(matrix.tasks, matrix.scores, strict=True)]
    if matrix.zero_shot is not None:
        rows.insert(0, ("zero-shot", matrix.zero_shot))
    font: Any = ImageFont.load_default(size=15)
    names = [_short(name) for name, _ in rows]
    left = MARGIN + round(max(font.getlength(name) for name in names)) + 10
    top = MARGIN + 24
    width = left + len(matrix) * CELL[0] + MARGIN
    height = top + len(rows) * CELL[1] + MARGIN
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    for column, task in enumerate(matrix.tasks):
        draw.text((left + (column + 0.5) * CELL[0], top - 6), _short(task, 11), fill=TEXT, font=font, anchor="ms")
    for row, (name, (_, scores)) in enumerate(zip(names, rows, strict=True)):
        y = top + row * CELL[1]
        draw.text((left - 10, y + CELL[1] / 2), name, fill=TEXT, font=font, anchor="rm")
        for column, score in enumerate(scores):
            if score is None:
                continue
            x, colour = left + column * CELL[0], score_colour(score)
            draw.rectangle((x + 1, y + 1, x + CELL[0] - 2, y + CELL[1] - 2), fill=colour)
            draw.text((x + CELL[0] / 2, y + CELL[1] / 2), f"{score:.1f}", fill=ink(colour), font=font, anchor="mm")
    return np.array(picture)


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
