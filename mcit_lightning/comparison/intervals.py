"""A drawing of means with their intervals: a row per method, one scale below."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mcit_lightning.comparison.axes import Axis, round_ticks, text_width
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.formatting import number_text
from mcit_lightning.evaluation.page import shortened

LONGEST = 290.0
"""Most room for the names on a wide page."""
ROW, HEAD = 30.0, 17.0
"""Height of a row, and of the line with its name above it on a narrow page."""


@dataclass(frozen=True)
class Row:
    """A method's row.

    Args:
        name: label.
        style: number of its colour.
        value: mean and interval.
        note: in soft letters behind the name.
    """

    name: str
    style: int
    value: Estimate
    note: str = ""


def interval_plot(
    rows: Sequence[Row],
    *,
    width: int,
    title: str,
    limits: tuple[float, float],
    zero: bool = False,
    signed: bool = False,
) -> str:
    """Draw a dot per mean, a line per interval and a small ring per seed.

    Args:
        rows: from top to bottom.
        width: width in CSS pixels; below 600 the names are above the rows.
        title: what a screen reader says.
        limits: lowest and highest value that there can be; intervals are cut there.
        zero: the scale includes zero, with a line at it.
        signed: print a sign before the means.
    """
    narrow = width < 600
    names = [f"{row.name} {row.note}".strip() for row in rows]
    left = 16.0 if narrow else min(LONGEST, max(map(text_width, names)) + 16)
    right = max(text_width(_text(row, signed=signed)) for row in rows) + 20
    each = ROW + HEAD if narrow else ROW
    ends = [end for row in rows for end in (row.value.low, row.value.high, *row.value.values)]
    low, high = max(min(ends), limits[0]), min(max(ends), limits[1])
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    bottom = each * len(rows) + 6
    axis = Axis(round_ticks(low, high, 4 if narrow else 8), left, width - right)
    parts = [f'<svg viewBox="0 0 {width} {bottom + 26:g}" width="{width}" role="img" aria-label="{escape(title)}">']
    for tick in axis.ticks:
        kind = "zero" if zero and tick == 0 else "grid"
        x = axis.at(tick)
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="2" y2="{bottom:g}"/>')
        text = number_text(tick, digits=_digits(axis))
        parts.append(f'<text class="axis" x="{x:.1f}" y="{bottom + 18:g}" text-anchor="middle">{text}</text>')
    for number, row in enumerate(rows):
        top = each * number
        y = top + (HEAD + ROW / 2 if narrow else ROW / 2)
        room = int((width - 16 if narrow else left - 12) / text_width("x"))
        anchor = f'x="0" y="{top + 14:g}"' if narrow else f'x="{left - 12:g}" y="{y + 4:g}" text-anchor="end"'
        parts.append(f'<text class="label {colour(row.style, "t")}" {anchor}>{_name(row, room)}</text>')
        parts.append(_mark(row, axis, y, signed=signed))
        text, _, half = _text(row, signed=signed).partition(" ")
        soft = f'<tspan class="axis"> {half}</tspan>' if half else ""
        parts.append(f'<text class="number" x="{width - right + 12:g}" y="{y + 4:g}">{text}{soft}</text>')
    return "".join([*parts, "</svg>"])


def colour(style: int, letter: str = "s") -> str:
    """CSS classes of a method's colour; from the ninth on the colours come again, with hollow marks and dashed lines."""
    return f"{letter}{style % 8}" + (" alt" if style >= 8 else "")


def _text(row: Row, *, signed: bool) -> str:
    half = "" if row.value.half is None else f" ± {number_text(row.value.half)}"
    return number_text(row.value.mean, signed=signed) + half


def _name(row: Row, room: int) -> str:
    note = f' <tspan class="axis">{escape(row.note)}</tspan>' if row.note else ""
    return escape(shortened(row.name, max(8, room - len(row.note) - 1 if row.note else room))) + note


def _mark(row: Row, axis: Axis, y: float, *, signed: bool) -> str:
    value, kind = row.value, colour(row.style)
    about = f"{row.name}: {number_text(value.mean, signed=signed)}"
    if value.half is not None and value.deviation is not None:
        about += f" ± {number_text(value.half)} (95 %), standard deviation {number_text(value.deviation)}"
    about += f", {len(value.values)} seed{'' if len(value.values) == 1 else 's'}: "
    about += ", ".join(number_text(seed, signed=signed) for seed in value.values)
    parts = [f"<g><title>{escape(about)}</title>"]
    if value.half is not None:
        one, two = axis.at(value.low), axis.at(value.high)
        parts.append(f'<line class="whisker {kind}" x1="{one:.1f}" x2="{two:.1f}" y1="{y:g}" y2="{y:g}"/>')
    parts += [f'<circle class="seed {kind}" cx="{axis.at(seed):.1f}" cy="{y:g}" r="3"/>' for seed in value.values]
    parts.append(f'<circle class="mean {kind}" cx="{axis.at(value.mean):.1f}" cy="{y:g}" r="5.5"/></g>')
    return "".join(parts)


def _digits(axis: Axis) -> int:
    return 0 if all(tick == round(tick) for tick in axis.ticks) else 1
