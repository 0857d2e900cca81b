"""The task of charts: matplotlib drawing columns of scikit-learn's tables."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mcit_lightning.quickstart.canvas import balanced
from mcit_lightning.quickstart.layout import SPLITS, Sample, Task

if TYPE_CHECKING:
    from matplotlib.axes import Axes

QUESTION = "What type of chart is this? Answer with one word."
TRAIN_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
TEST_COLOURS = ("tab:purple", "tab:brown", "tab:pink", "tab:olive")


def charts(size: int, counts: Mapping[str, int], seed: int) -> Task:
    """Which of eight types a chart is; the test charts show other tables in other colours."""
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris, load_wine

    train = [load_iris().data, load_wine().data]
    test = [load_breast_cancer().data, load_diabetes(scaled=False).data]
    splits = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}/charts/{split}")
        tables, colours = (test, TEST_COLOURS) if split == "test" else (train, TRAIN_COLOURS)
        samples = []
        for kind in balanced(sorted(KINDS), counts[split], rng):
            samples.append(Sample(draw(kind, rng.choice(tables), colours, size, rng), QUESTION, kind))
        splits[split] = samples
    return Task("charts", splits, "matplotlib, scikit-learn tables", "PSF-style; BSD-3-Clause", "other tables, colours")


def draw(kind: str, table: np.ndarray, colours: tuple[str, ...], size: int, rng: random.Random) -> Image.Image:
    """A chart of one kind of some rows and columns of `table`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1), dpi=size)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0.06, 0.06, 0.88, 0.88))
    KINDS[kind](axes, table, rng.sample(colours, len(colours)), rng)
    # Text is unreadable at this size, and its layout is most of matplotlib's time.
    axes.set_xticks([])
    axes.set_yticks([])
    canvas.draw()
    return Image.frombuffer("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _column(table: np.ndarray, rng: random.Random, rows: int) -> np.ndarray:
    start = rng.randrange(len(table) - rows)
    return table[start : start + rows, rng.randrange(table.shape[1])]


def _area(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    values = [_column(table, rng, 15) for _ in range(rng.randint(1, 2))]
    axes.stackplot(range(15), *[column - column.min() + 0.3 * np.ptp(column) for column in values], colors=colours)


def _bar(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    values = _column(table, rng, rng.randint(4, 8))
    heights = values - values.min() + 0.3 * (np.ptp(values) or 1.0)
    axes.bar(range(len(values)), heights, color=colours[0], width=rng.uniform(0.5, 0.8))


def _box(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    columns = [_column(table, rng, 40) for _ in range(rng.randint(2, 4))]
    scaled = [(column - column.mean()) / (column.std() or 1.0) + rng.uniform(-0.5, 0.5) for column in columns]
    parts = axes.boxplot(scaled, patch_artist=True, widths=0.6)
    for box in parts["boxes"]:
        box.set_facecolor(colours[0])


def _heatmap(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    side = rng.randint(5, 10)
    start = rng.randrange(len(table) - 40)
    columns = np.resize(rng.sample(range(table.shape[1]), min(side, table.shape[1])), side)
    block = table[start : start + side, columns]
    axes.imshow((block - block.mean(0)) / (block.std(0) + 1e-6), cmap=rng.choice(["viridis", "coolwarm", "magma"]))


def _histogram(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    axes.hist(_column(table, rng, 120), bins=rng.randint(12, 24), color=colours[0])


def _line(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    for colour in colours[: rng.randint(1, 3)]:
        axes.plot(_column(table, rng, rng.randint(12, 30)), color=colour, linewidth=rng.uniform(1, 2))


def _pie(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    values = _column(table, rng, rng.randint(3, 5))
    axes.pie(values - values.min() + 0.3 * (np.ptp(values) or 1.0), colors=colours, startangle=rng.uniform(0, 360))


def _scatter(axes: Axes, table: np.ndarray, colours: list[str], rng: random.Random) -> None:
    rows = rng.sample(range(len(table)), 40)
    first, second = rng.sample(range(table.shape[1]), 2)
    axes.scatter(table[rows, first], table[rows, second], s=rng.uniform(4, 14), color=colours[0])


KINDS: dict[str, Callable[[Axes, np.ndarray, list[str], random.Random], None]] = {
    "area": _area,
    "bar": _bar,
    "box": _box,
    "heatmap": _heatmap,
    "histogram": _histogram,
    "line": _line,
    "pie": _pie,
    "scatter": _scatter,
}
