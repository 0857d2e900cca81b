"""Grounding: boxes in the picture."""

import math
import re
from collections.abc import Sequence
from typing import Any

from mcit_lightning.evaluation.metrics.base import METRICS, AnswerMetric

Box = tuple[float, float, float, float]


@METRICS.register("iou")
class BoxIou(AnswerMetric):
    """1 if the box that the answer names overlaps the reference with an intersection over union of at least 0.5.

    Boxes are x1, y1, x2, y2 in one of two forms: fractions of the picture (`[0.1, 0.2, 0.5, 0.9]`) or thousandths of
    it (`<box>[[100, 200, 500, 900]]</box>`); a box with a number above 1 is in thousandths. A reference in pixels is
    accepted where the row has `width` and `height`.

    Published (D-MoLE's SK-VG, InternVL's RefCOCO): the reference is in pixels. Its defects: a box without brackets is not
    found; a box in thousandths whose numbers sum to less than 4 is taken for fractions.
    """

    published = "evaluate_grounding.py (D-MoLE: skvg)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        right = parse_box(reference)
        if right is None:
            raise ValueError(
                f"the answer must be a box of four numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2, got {reference!r}"
            )
        if self.mode == "published":
            return self._published(prediction, right, _length(extra, "width"), _length(extra, "height"))
        if max(right) > 1.0:
            width, height = _length(extra, "width", 1000.0), _length(extra, "height", 1000.0)
            right = (right[0] / width, right[1] / height, right[2] / width, right[3] / height)
        given = parse_box(prediction)
        if given is None:
            return 0.0
        scale = 1000.0 if max(given) > 1.0 else 1.0
        return float(box_iou((given[0] / scale, given[1] / scale, given[2] / scale, given[3] / scale), right) >= 0.5)

    def _published(self, prediction: str, right: Box, width: float, height: float) -> float:
        found = re.search(r"\[(.*?),(.*?),(.*?),(.*?)\]", prediction)
        try:
            x1, y1, x2, y2 = (float(number.lstrip("[")) for number in found.groups()) if found else (0.0,) * 4
        except ValueError:
            x1 = y1 = x2 = y2 = 0.0
        scale = 1000.0 if x1 + y1 + x2 + y2 >= 4 else 1.0
        box = (x1 / scale * width, y1 / scale * height, x2 / scale * width, y2 / scale * height)
        return float(box_iou(box, right) >= 0.5)


@METRICS.register("coin_grounding")
class CoinGrounding(AnswerMetric):
    """1 if the box that the answer names overlaps the reference with an intersection over union above 0.5, as `iou`.

    Both boxes are fractions of the picture padded to a square (`answer_bbox`, or `answer`).

    Published (CoIN's Grounding). Its defects: the brackets are taken off twice, so the first and the last character of the
    numbers are lost ("[0.1,0.2,0.5,0.95]" is read as .1, .2, .5, .9; "[1,0,1,1]" cannot be read); anything but four numbers
    with commas is wrong, a word before the box too.
    """

    published = "eval_grounding.py (CoIN)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        right = parse_box(reference)
        if right is None or max(right) > 1.0:
            raise ValueError(f"the answer must be a box of four fractions x1, y1, x2, y2, got {reference!r}")
        if self.mode == "fixed":
            given = parse_box(prediction)
            return float(given is not None and box_iou(given, right) > 0.5)
        side = _longer_side(extra)
        try:
            box = [float(number) for number in prediction.replace("[", "").replace("]", "")[1:-1].split(",")]
        except ValueError:
            return 0.0
        return float(len(box) == 4 and box_iou(_times(box, side), _times(right, side)) > 0.5)


def parse_box(value: Any) -> Box | None:
    """The first four numbers of a text or list as a box; None if there are fewer or they span no area."""
    text = value if isinstance(value, str) else repr(value)
    numbers = [float(number) for number in re.findall(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)", text)[:4]]
    if len(numbers) < 4:
        return None
    left, top, right, bottom = numbers
    return (left, top, right, bottom) if left < right and top < bottom else None


def box_iou(one: Box, two: Box) -> float:
    """Area of the intersection of two boxes over the area of their union; 0 where they have none, or are no numbers."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area = (one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1])
    return shared / (area - shared) if area - shared > 0 else 0.0


def _times(box: Sequence[float], factor: float) -> Box:
    return (box[0] * factor, box[1] * factor, box[2] * factor, box[3] * factor)


def _longer_side(extra: dict[str, Any]) -> float:
    """The side of the padded square in pixels, 1 where the row has no `size`: it matters to the rounding alone."""
    size = extra.get("size", [1])
    if (
        not isinstance(size, list)
        or not size
        or not all(isinstance(side, int | float) and 0 < side < math.inf for side in size)
    ):
        raise ValueError(f"`size` must be the picture's width and height in pixels, got {size!r}")
    return float(max(size))


def _length(extra: dict[str, Any], key: str, default: float | None = None) -> float:
    value = extra.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ValueError(f"`{key}` must be the picture's {key} in pixels, got {value!r}")
    return float(value)
