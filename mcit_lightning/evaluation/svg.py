"""A line chart as inline SVG: no script, no fonts of its own, colours from the page's CSS classes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Scale = Callable[[float], float]
"""From a value to a coordinate."""

LETTER = 7.5
"""Room for a character of a label, in CSS pixels."""
LONG = 19
"""Characters of a label that are shown."""
LABEL_STEP = 16.0
"""Least distance between the baselines of two labels."""


@dataclass(frozen=True)
class Line:
    """A curve: a score per stage, None where there is none.

    Args:
        name: label.
        style: number that picks the colour (`s0` to `s7` in the page's CSS); from 8 on the line is dashed.
        values: one per tick of the horizontal axis.
        solid_from: index from which the line is solid; before it, it is dotted.
        spread: lower and upper end of a band around the values, None where there is none; empty draws no band.
    """

    name: str
    style: int
    values: list[float | None]
    solid_from: int = 0
    spread: Sequence[tuple[float, float] | None] = ()

    def points(self) -> list[tuple[int, float]]:
        """The known values with their index."""
        return [(index, value) for index, value in enumerate(self.values) if value is not None]


def line_chart(
    lines: list[Line],
    ticks: list[str],
    hints: list[str],
    *,
    width: int,
    height: int,
    labels: bool,
    title: str,
    top: int = 100,
) -> str:
    """Draw scores (0 to `top`) over stages.

    Args:
        lines: the curves.
        ticks: texts below the horizontal axis.
        hints: what the ticks mean, shown with the value when the pointer rests on a point.
        width: width of the drawing in CSS pixels at which its text has its natural size.
        height: height likewise.
        labels: write each curve's name at its end; leave it out where the page has a legend.
        title: what a screen reader says.
        top: upper end of the vertical axis, a multiple of 25.
    """
    longest = max((len(line.name) for line in lines), default=0)
    right = 24 + LETTER * (min(longest, LONG) + len(" 100.0")) if labels else 14
    left, above, bottom = 34, 12, 30
    inner_width, inner_height = width - left - right, height - above - bottom

    def x(index: float) -> float:
        return left + inner_width * (index / (len(ticks) - 1) if len(ticks) > 1 else 0.5)

    def y(value: float) -> float:
        return above + inner_height * (1 - min(max(value, 0.0), top) / top)

    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">']
    for value in range(0, top + 1, 25):
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text class="axis" x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value}</text>')
    every = max(1, round(len(ticks) * 44 / inner_width + 0.49))
    for index, tick in enumerate(ticks):
        if index % every == 0 or index == len(ticks) - 1:
            parts.append(
                f'<text class="axis" x="{x(index):.1f}" y="{height - 8}" text-anchor="middle">{escape(tick)}</text>'
            )
    parts += [_band(line, x, y) for line in lines if line.spread]
    for line in lines:
        parts.extend(_curve(line, hints, x, y))
    if labels:
        parts.extend(_end_labels(lines, x, y, width - right, height - bottom))
    parts.append("</svg>")
    return "".join(parts)


def _band(line: Line, x: Scale, y: Scale) -> str:
    """The area between the ends of the spread, as far as they are known."""
    known = [(index, ends) for index, ends in enumerate(line.spread) if ends is not None]
    if len(known) < 2:
        return ""
    upper = [f"{x(index):.1f},{y(high):.1f}" for index, (_, high) in known]
    lower = [f"{x(index):.1f},{y(low):.1f}" for index, (low, _) in reversed(known)]
    return f'<polygon class="band s{line.style % 8}" points="{" ".join(upper + lower)}"/>'


def _curve(line: Line, hints: list[str], x: Scale, y: Scale) -> list[str]:
    """The dotted part before the task was learnt, the solid part after it, and a marker per score."""
    points = line.points()
    before = [point for point in points if point[0] <= line.solid_from]
    after = [point for point in points if point[0] >= line.solid_from]
    colour = f"s{line.style % 8}" + (" alt" if line.style >= 8 else "")
    parts = []
    for part, kind in ((before, "before"), (after, "after")):
        if len(part) > 1:
            path = " ".join(f"{x(index):.1f},{y(value):.1f}" for index, value in part)
            parts.append(f'<polyline class="{kind} {colour}" points="{path}"/>')
    for index, value in points:
        small = index < line.solid_from
        text = f"{line.name}, {hints[index]}: {value:.1f}"
        parts.append(
            f'<circle class="{"hollow" if small else "dot"} {colour}" cx="{x(index):.1f}" cy="{y(value):.1f}" '
            f'r="{2.5 if small else 3.5}"><title>{escape(text)}</title></circle>'
        )
    return parts


def _end_labels(lines: list[Line], x: Scale, y: Scale, edge: float, floor: float) -> list[str]:
    """Names right of the drawing, moved apart where they would overlap, with a thin line to where each curve ends."""
    ends = [(y(points[-1][1]), points[-1][0], line) for line in lines if (points := line.points())]
    ends.sort(key=lambda end: end[:2])
    places = [end[0] for end in ends]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + LABEL_STEP)
    limit = floor
    for index in reversed(range(len(places))):
        places[index] = min(places[index], limit)
        limit = places[index] - LABEL_STEP
    parts = []
    for (height, last, line), place in zip(ends, places, strict=True):
        start = x(last) + 7
        name = line.name if len(line.name) <= LONG else line.name[: LONG - 1] + "\N{HORIZONTAL ELLIPSIS}"
        value = line.points()[-1][1]
        parts.append(
            f'<polyline class="lead s{line.style % 8}" points="{start:.1f},{height:.1f} {edge + 17:.1f},{place:.1f}"/>'
        )
        parts.append(
            f'<text class="label t{line.style % 8}" x="{edge + 21:.1f}" y="{place + 4:.1f}">'
            f'{escape(name)} <tspan class="axis">{value:.1f}</tspan></text>'
        )
    return parts
