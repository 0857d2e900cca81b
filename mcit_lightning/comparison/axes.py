"""What the drawings of a comparison have in common: round ticks, text widths, places for labels."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

CHARACTER = 7.5
"""Mean width of a character of a label, in CSS pixels; a little more than most fonts need."""

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def round_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten that cover the range, about so many; a range without extent gets one."""
    if high - low < 1e-6:
        high = low + 1.0
    span = high - low
    power = 10.0 ** math.floor(math.log10(span / about))
    step = next(step for factor in (1, 2, 5, 10) if span / (step := factor * power) <= about)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 10) for number in range(first, max(last, first + 1) + 1)]


@dataclass(frozen=True)
class Axis:
    """From values to coordinates, with ticks at both ends.

    Args:
        ticks: in rising order.
        start: coordinate of the first.
        end: coordinate of the last.
    """

    ticks: Sequence[float]
    start: float
    end: float

    def at(self, value: float) -> float:
        """The coordinate of a value; of one outside, that of the nearer end."""
        share = (value - self.ticks[0]) / (self.ticks[-1] - self.ticks[0])
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


def text_width(text: str) -> float:
    """About how wide a label is, in CSS pixels."""
    return CHARACTER * len(text)


def overlap(one: Box, two: Box) -> float:
    """Common area of two boxes."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    return max(width, 0.0) * max(height, 0.0)


@dataclass(frozen=True)
class Place:
    """Where a label stands.

    Args:
        box: what it covers.
        anchor: which end of the text is fixed (`start`, `middle`, `end`).
        distance: how far it is from its point.
    """

    box: Box
    anchor: str
    distance: float

    @property
    def x(self) -> float:
        """Where the text is anchored."""
        left, _, right, _ = self.box
        return {"start": left, "middle": (left + right) / 2, "end": right}[self.anchor]


def place_label(text: str, x: float, y: float, taken: Sequence[Box], inside: Box) -> Place | None:
    """A free place for a label around a point; None if there is none.

    Args:
        text: the label.
        x: coordinate of the point.
        y: likewise.
        taken: boxes that it must not touch.
        inside: where it must be.
    """
    width, height = text_width(text), 15.0
    for distance in (10.0, 17.0, 26.0, 38.0, 52.0):
        for across, down in ((1, -1), (1, 1), (-1, -1), (-1, 1), (1, 0), (-1, 0), (0, -1), (0, 1)):
            reach = distance if across == 0 or down == 0 else distance * 0.75
            left = x + across * reach - (0 if across > 0 else width if across < 0 else width / 2)
            middle = y + down * (reach + (height / 2 if across == 0 else 0))
            box = (left, middle - height / 2, left + width, middle + height / 2)
            fits = box[0] >= inside[0] and box[1] >= inside[1] and box[2] <= inside[2] and box[3] <= inside[3]
            if fits and not any(overlap(box, other) for other in taken):
                return Place(box, {1: "start", 0: "middle", -1: "end"}[across], distance)
    return None
