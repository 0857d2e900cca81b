"""A drawing of two numbers per method against each other, with their intervals and the methods' names beside the points."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from mcit_lightning.comparison.axes import Axis, Box, place_label, round_ticks
from mcit_lightning.comparison.intervals import colour
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.formatting import number_text


@dataclass(frozen=True)
class Point:
    """A method's place.

    Args:
        name: label.
        style: number of its colour.
        x: across.
        y: up.
    """

    name: str
    style: int
    x: Estimate
    y: Estimate


def scatter(
    points: Sequence[Point],
    *,
    width: int,
    height: int,
    title: str,
    labels: tuple[str, str],
    zeros: tuple[bool, bool] = (False, False),
    x_text: Callable[[float], str] = lambda value: number_text(value, digits=0),
) -> str:
    """Draw the means as dots, their intervals as crosses and the seeds as small rings.

    A label for which there is no room is left out: a narrow drawing has a legend below it.

    Args:
        points: one per method.
        width: in CSS pixels.
        height: likewise.
        title: what a screen reader says.
        labels: of the axes.
        zeros: whether each axis includes zero, with a line at it.
        x_text: writes a tick of the horizontal axis.
    """
    left, right, above, below = 46.0, 14.0, 26.0, 46.0
    x = Axis(_ticks([point.x for point in points], zeros[0], 4 if width < 600 else 7), left, width - right)
    y = Axis(_ticks([point.y for point in points], zeros[1], 8), height - below, above)
    parts = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" aria-label="{escape(title)}">']
    for tick in x.ticks:
        kind = "zero" if zeros[0] and tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{x.at(tick):.1f}" x2="{x.at(tick):.1f}" y1="{above:g}" y2="{height - below:g}"/>'
        )
        parts.append(
            f'<text class="axis" x="{x.at(tick):.1f}" y="{height - below + 17:g}" text-anchor="middle">{x_text(tick)}</text>'
        )
    for tick in y.ticks:
        kind = "zero" if zeros[1] and tick == 0 else "grid"
        parts.append(
            f'<line class="{kind}" x1="{left:g}" x2="{width - right:g}" y1="{y.at(tick):.1f}" y2="{y.at(tick):.1f}"/>'
        )
        parts.append(
            f'<text class="axis" x="{left - 8:g}" y="{y.at(tick) + 4:.1f}" text-anchor="end">{number_text(tick, digits=0)}</text>'
        )
    middle = (left + width - right) / 2
    parts.append(f'<text class="axis" x="{middle:g}" y="{height - 8}" text-anchor="middle">{escape(labels[0])}</text>')
    parts.append(f'<text class="axis" x="2" y="14">{escape(labels[1])}</text>')
    parts += [_point(point, x, y) for point in points]
    parts += _labels(points, x, y, (left + 2, above + 2, width - right - 2, height - below - 2))
    return "".join([*parts, "</svg>"])


def _ticks(values: Sequence[Estimate], zero: bool, about: int) -> list[float]:
    """A scale that holds every seed; intervals may be cut."""
    ends = [seed for value in values for seed in value.values] + ([0.0] if zero else [])
    low, high = min(ends), max(ends)
    room = 0.06 * (high - low) or 1.0
    return round_ticks(low - (0 if zero and low == 0 else room), high + (0 if zero and high == 0 else room), about)


def _point(point: Point, x: Axis, y: Axis) -> str:
    kind, across, up = colour(point.style), x.at(point.x.mean), y.at(point.y.mean)
    parts = [f"<g><title>{escape(point.name)}: {number_text(point.x.mean)}, {number_text(point.y.mean)}</title>"]
    if point.x.half is not None:
        ends = f'x1="{x.at(point.x.low):.1f}" x2="{x.at(point.x.high):.1f}"'
        parts.append(f'<line class="cross {kind}" {ends} y1="{up:.1f}" y2="{up:.1f}"/>')
    if point.y.half is not None:
        ends = f'y1="{y.at(point.y.low):.1f}" y2="{y.at(point.y.high):.1f}"'
        parts.append(f'<line class="cross {kind}" x1="{across:.1f}" x2="{across:.1f}" {ends}/>')
    if len(point.x.values) == len(point.y.values) > 1:
        pairs = zip(point.x.values, point.y.values, strict=True)
        parts += [f'<circle class="seed {kind}" cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="2.5"/>' for a, b in pairs]
    parts.append(f'<circle class="mean {kind}" cx="{across:.1f}" cy="{up:.1f}" r="6"/></g>')
    return "".join(parts)


def _labels(points: Sequence[Point], x: Axis, y: Axis, inside: Box) -> list[str]:
    """Names where there is room for them, a thin line to those that are farther off."""
    places = [(x.at(point.x.mean), y.at(point.y.mean), point) for point in points]
    taken: list[Box] = [(across - 7, up - 7, across + 7, up + 7) for across, up, _ in places]
    parts = []
    for across, up, point in sorted(places, key=lambda place: place[:2]):
        found = place_label(point.name, across, up, taken, inside)
        if found is None:
            continue
        box = found.box
        taken.append(box)
        if found.distance > 20:
            end = (min(max(across, box[0]), box[2]), min(max(up, box[1]), box[3]))
            parts.append(
                f'<line class="lead {colour(point.style)}" x1="{across:.1f}" y1="{up:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"/>'
            )
        parts.append(
            f'<text class="label {colour(point.style, "t")}" x="{found.x:.1f}" y="{box[3] - 4:.1f}" '
            f'text-anchor="{found.anchor}">{escape(point.name)}</text>'
        )
    return parts
