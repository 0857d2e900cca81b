"""The page's forgetting curves, accuracy matrices, and plasticity against stability."""

import math
from collections.abc import Sequence
from html import escape

from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.heat import HeatCell, heat_map
from mcit_lightning.comparison.methods import Group, Method
from mcit_lightning.comparison.scatter import Point, scatter
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.formatting import number_text
from mcit_lightning.evaluation.page import legend, section
from mcit_lightning.evaluation.svg import Line, line_chart

BANDS = 5
"""With more methods than this, bands would only cover each other."""
HALF = 500
"""Width of a chart that has another one beside it."""


def cell_estimate(method: Method, row: int, column: int) -> Estimate | None:
    """Mean over the seeds of a cell of the accuracy matrix."""
    return method.estimate(lambda run: run.results.matrix.scores[row][column])


def _zero_shot(method: Method, column: int) -> Estimate | None:
    """Mean over the seeds of a score before training."""
    return method.estimate(lambda run: None if run.results.zero_shot is None else run.results.zero_shot[column])


def curves_section(group: Group, gallery: Gallery) -> str:
    """A chart per task with a curve per method; empty for a single stage."""
    stages = len(group.tasks)
    if stages < 2:
        return ""
    charts, drawn = [], [method for method in group.ranked() if method.strategy != "zero_shot"]
    bands = len(drawn) <= BANDS
    highest = max(
        (
            score
            for m in drawn
            for run in m.runs
            for row in run.results.matrix.scores
            for score in row
            if score is not None
        ),
        default=100.0,
    )
    top = max(25, 25 * math.ceil(highest / 25))
    for column, task in enumerate(group.tasks):
        lines = [line for method in drawn if (line := _line(method, column, stages, band=bands)) is not None]
        if not lines:
            continue
        hints = [f"after stage {number} ({name})" for number, name in enumerate(group.tasks, start=1)]
        chart = _chart(gallery, f"order{group.number}/forgetting/{task}", lines, hints, top)
        charts.append(f"<div><h3>{escape(task)}</h3>{chart}</div>")
    if not charts:
        return ""
    spread = " Band: 95 % t-interval over the seeds." if bands and any(len(m.runs) > 1 for m in drawn) else ""
    return section(
        "Forgetting curves",
        f"Score of each task after each stage, mean over the seeds; dotted before the task was learnt.{spread} A single dot: a "
        "method that evaluates the task only once.",
        f'<div class="pairs">{"".join(charts)}</div>',
    )


def _line(method: Method, column: int, stages: int, *, band: bool) -> Line | None:
    cells = [cell_estimate(method, row, column) for row in range(stages)]
    if all(cell is None for cell in cells):
        return None
    spread: Sequence[tuple[float, float] | None] = ()
    if band and len(method.runs) > 1:
        spread = [None if cell is None or row < column else (cell.low, cell.high) for row, cell in enumerate(cells)]
    values = [None if cell is None else cell.mean for cell in cells]
    return Line(method.name, method.style, values, solid_from=column, spread=spread)


def _chart(gallery: Gallery, name: str, lines: list[Line], hints: list[str], top: int) -> str:
    ticks = [str(number) for number in range(1, len(hints) + 1)]

    def draw(width: int) -> str:
        wide = width == HALF
        height = max(220, 24 + 17 * len(lines)) if wide else 220
        return line_chart(
            lines,
            ticks,
            hints,
            width=width,
            height=height,
            labels=wide,
            title=f"Score after each stage: {name}",
            top=top,
        )

    return gallery.add_sizes(name, draw, wide=HALF, below=legend([(line.name, line.style) for line in lines]))


def matrices_section(group: Group, gallery: Gallery) -> str:
    """The mean accuracy matrix of every method, beside each other."""
    parts = []
    for method in group.ranked():
        rows: list[tuple[str, list[HeatCell | None]]] = []
        before = [_zero_shot(method, column) for column in range(len(group.tasks))]
        if any(before):
            rows.append(
                (
                    "before",
                    [
                        _heat(cell, method, "before training", task)
                        for cell, task in zip(before, group.tasks, strict=True)
                    ],
                )
            )
        for row, stage in enumerate(group.tasks):
            cells = [cell_estimate(method, row, column) for column in range(len(group.tasks))]
            if any(cells):
                name = method.runs[0].results.row_name(row)
                pairs = zip(cells, group.tasks, strict=True)
                own = name == stage
                rows.append(
                    (
                        name,
                        [_heat(cell, method, f"after {name}", task, own=own and stage == task) for cell, task in pairs],
                    )
                )
        svg = heat_map(rows, group.tasks, title=f"Accuracy matrix of {method.name}", names=group.tasks) if rows else ""
        if svg:
            parts.append(
                f"<div><h3>{escape(method.name)}</h3>{gallery.add(f'order{group.number}/matrix/{method.name}', svg)}</div>"
            )
    return section(
        "Accuracy matrices",
        "Score in percent on each task (column) after each stage (row), mean over the seeds. Bold: the task just learnt.",
        f'<div class="tiled">{"".join(parts)}</div>',
    )


def _heat(cell: Estimate | None, method: Method, when: str, task: str, *, own: bool = False) -> HeatCell | None:
    if cell is None:
        return None
    spread = "" if cell.deviation is None else f", standard deviation {number_text(cell.deviation)}"
    seeds = f"{len(cell.values)} seed{'' if len(cell.values) == 1 else 's'}"
    return HeatCell(cell.mean, f"{method.name}, {when}, {task}: {number_text(cell.mean)}{spread} ({seeds})", own)


def plasticity_section(group: Group, gallery: Gallery) -> str:
    """What is learnt against what is kept; empty if no method has both numbers."""
    points, missing = [], []
    for method in group.ranked():
        learnt, change = method.summary("MFT"), method.summary("BWT")
        if learnt is None or change is None:
            missing.append(method.name)
        else:
            points.append(Point(method.name, method.style, learnt, change))
    if not points:
        return ""

    def draw(width: int) -> str:
        title = "Just learnt (MFT) against backward transfer (BWT)"
        labels = (
            "Just learnt, MFT (plasticity): more is better",
            "Backward transfer, BWT (stability): zero keeps everything",
        )
        return scatter(
            points, width=width, height=460 if width > 600 else 340, title=title, labels=labels, zeros=(False, True)
        )

    names = legend([(point.name, point.style) for point in points])
    left_out = f'<p class="soft small">Without both numbers: {escape(", ".join(missing))}.</p>' if missing else ""
    return section(
        "Plasticity and stability",
        "The upper right corner learns much and forgets nothing. Dot: mean; cross: 95 % t-intervals; rings: seeds.",
        gallery.add_sizes(f"order{group.number}/plasticity_stability", draw, below=names),
        left_out,
    )
