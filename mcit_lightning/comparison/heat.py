"""A heat-map in percent as inline SVG of natural size, so that several fit beside each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mcit_lightning.comparison.axes import text_width
from mcit_lightning.evaluation.formatting import number_text
from mcit_lightning.evaluation.page import score_style, shortened

HEIGHT = 32.0
"""Height of a row."""
SMALLEST, LARGEST = 50.0, 78.0
"""Least and largest width of a column."""
NAMES = 18
"""Characters of a row's name that are shown."""


@dataclass(frozen=True)
class HeatCell:
    """A number on its colour.

    Args:
        value: percent.
        title: what is shown when the pointer rests on it.
        own: print it bold.
    """

    value: float
    title: str
    own: bool = False


def heat_map(
    rows: Sequence[tuple[str, Sequence[HeatCell | None]]],
    columns: Sequence[str],
    *,
    title: str,
    widest: float = LARGEST,
    names: Sequence[str] = (),
) -> str:
    """Draw the cells with the names of rows and columns.

    Columns whose names have no room and stand for the same things as the rows are numbered, and so are those rows.

    Args:
        rows: name and cells from the top; None leaves a cell out.
        columns: names.
        title: what a screen reader says.
        widest: largest width of a column, in CSS pixels.
        names: names for which there must be room on the left, so that maps beside each other look alike.
    """
    numbers: dict[str, int] = {}
    if any(text_width(name) + 8 > widest for name in columns) and any(name in columns for name, _ in rows):
        numbers = {name: number for number, name in enumerate(columns, start=1)}

    def label(name: str) -> str:
        return shortened(f"{numbers[name]} {name}" if name in numbers else name, NAMES)

    shown = [label(name) for name, _ in rows]
    left = max(text_width(label(name)) for name in (*names, *(name for name, _ in rows))) + 8
    each = SMALLEST if numbers else min(max([SMALLEST, *(text_width(name) + 8 for name in columns)]), widest)
    width, top = left + each * len(columns), 24.0
    height = top + HEIGHT * len(rows)
    parts = [f'<svg viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img" aria-label="{escape(title)}">']
    for number, column in enumerate(columns):
        short = str(numbers[column]) if numbers else escape(shortened(column, int((each - 4) / text_width("x"))))
        parts.append(
            f'<text class="axis" x="{left + each * (number + 0.5):g}" y="{top - 8:g}" text-anchor="middle">{short}'
            f"<title>{escape(column)}</title></text>"
        )
    for number, (name, (_, cells)) in enumerate(zip(shown, rows, strict=True)):
        y = top + HEIGHT * number
        parts.append(
            f'<text class="axis" x="{left - 8:g}" y="{y + HEIGHT / 2 + 4:g}" text-anchor="end">{escape(name)}</text>'
        )
        parts += [_cell(cell, left + each * place, y, each) for place, cell in enumerate(cells) if cell is not None]
    return "".join([*parts, "</svg>"])


def _cell(cell: HeatCell, x: float, y: float, width: float) -> str:
    kind = "value own" if cell.own else "value"
    return (
        f'<g class="heat" style="{score_style(cell.value)}"><title>{escape(cell.title)}</title>'
        f'<rect x="{x + 1:g}" y="{y + 1:g}" width="{width - 2:g}" height="{HEIGHT - 2:g}" rx="3"/>'
        f'<text class="{kind}" x="{x + width / 2:g}" y="{y + HEIGHT / 2 + 4.5:g}" text-anchor="middle">'
        f"{number_text(cell.value)}</text></g>"
    )
