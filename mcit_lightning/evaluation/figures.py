"""The accuracy matrix and the placement of experts as pictures, for TensorBoard. Drawn with Pillow alone."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from mcit_lightning.evaluation.colours import TASK_LIGHT, ink, score_colour
from mcit_lightning.evaluation.placement import experts, tower_modules
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.transfer import TransferMatrix

CELL = (84, 40)
MARGIN = 12
TEXT = (23, 27, 33)
SLOT = (225, 229, 234)
BLOCK = (7, 22)
"""Width and height of a module in the placement."""
LAYER_GAP = 4


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


def placement_image(results: Results) -> NDArray[np.uint8]:
    """Draw which module got an expert in which stage, a block per tower.

    Args:
        results: of a strategy with a budget, evaluated at least once.

    Returns: An array of shape [height, width, 3]: a row per stage, a column per module in the model's order.
    """
    towers = tower_modules(results)
    assert towers and results.allocation
    font: Any = ImageFont.load_default(size=15)
    names = [_short(stage) for stage in results.allocation]
    left = MARGIN + round(max(font.getlength(name) for name in names)) + 10
    widest = max(BLOCK[0] * len(modules.paths) + LAYER_GAP * len(modules.layers) for modules in towers)
    each = 32 + BLOCK[1] * len(names)
    picture = Image.new("RGB", (max(left + widest, left + 120) + MARGIN, MARGIN + each * len(towers)), "white")
    draw = ImageDraw.Draw(picture)
    for number, modules in enumerate(towers):
        top = MARGIN + each * number
        draw.text((left, top), modules.tower, fill=TEXT, font=font)
        colour = TASK_LIGHT[1] if modules.tower == "vision" else TASK_LIGHT[0]
        for row, (name, own) in enumerate(zip(names, experts(results, modules).values(), strict=True)):
            x, y = left, top + 22 + row * BLOCK[1]
            draw.text((left - 10, y + BLOCK[1] / 2), name, fill=TEXT, font=font, anchor="rm")
            for _, paths in modules.layers:
                for path in paths:
                    fill = SLOT if own[path].rank is None else colour
                    draw.rectangle((x, y + 1, x + BLOCK[0] - 2, y + BLOCK[1] - 2), fill=fill)
                    x += BLOCK[0]
                x += LAYER_GAP
    return np.array(picture)


def _short(name: str, length: int = 24) -> str:
    return name if len(name) <= length else name[: length - 1] + "\N{HORIZONTAL ELLIPSIS}"
