"""The page's SVG drawings as pixels, for TensorBoard. Knows the elements and CSS classes that those drawings use, no others.

Colours are those of a light page; the classes are explained by the page's template, whose look this follows.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from mcit_lightning.evaluation.colours import RGB, TASK_LIGHT

SCALE = 2
"""Pixels per CSS pixel."""
MARGIN = 10
INK, SOFT, RULE, PAGE, SLOT = "#171b21", "#565f6b", "#dfe3e8", "#ffffff", "#e1e5ea"


@dataclass(frozen=True)
class Look:
    """How an element is painted; `current` stands for the colour that it inherits."""

    fill: str | None = None
    stroke: str | None = None
    width: float = 1.0
    opacity: float = 1.0
    dash: tuple[float, float] | None = None
    size: float = 13.0


LOOKS: dict[str, Look] = {
    "grid": Look(stroke=RULE),
    "zero": Look(stroke=SOFT, width=1.25),
    "axis": Look(fill=SOFT, size=12),
    "label": Look(fill="current"),
    "number": Look(fill=INK),
    "after": Look(stroke="current", width=2.25),
    "before": Look(stroke="current", width=1.5, dash=(1, 5)),
    "lead": Look(stroke="current", opacity=0.55),
    "band": Look(fill="current", opacity=0.12),
    "dot": Look(fill="current", stroke=PAGE, width=1.5),
    "hollow": Look(fill=PAGE, stroke="current", width=1.25),
    "whisker": Look(stroke="current", width=2.5, opacity=0.6),
    "cross": Look(stroke="current", width=1.25, opacity=0.5),
    "seed": Look(stroke="current", opacity=0.75),
    "mean": Look(fill="current", stroke=PAGE, width=1.5),
    "cell": Look(fill=SLOT),
    "again": Look(fill=PAGE),
    "value": Look(fill=INK),
}
"""First class of an element -> its look."""
ALTERED = {
    "after": Look(stroke="current", width=2.25, dash=(8, 5)),
    "mean": Look(fill=PAGE, stroke="current", width=2.0),
}
"""Looks together with the class `alt`."""
TOWERS = {"vision": TASK_LIGHT[1], "language": TASK_LIGHT[0]}
NUMBER = r"-?\d+(?:\.\d+)?"


def rasterize(svg: str) -> NDArray[np.uint8]:
    """Draw an SVG on white.

    Args:
        svg: one of the page's drawings, with a `viewBox`.

    Returns: An array of shape [height, width, 3], with `SCALE` pixels per CSS pixel.
    """
    root = ElementTree.fromstring(svg)
    width, height = (float(part) for part in root.attrib["viewBox"].split()[2:])
    size = (round((width + 2 * MARGIN) * SCALE), round((height + 2 * MARGIN) * SCALE))
    picture = Image.new("RGB", size, PAGE)
    pen = _Pen(ImageDraw.Draw(picture, "RGBA"), MARGIN)
    for child in root:
        pen.draw(child)
    return np.array(picture)


class _Pen:
    """Paints elements at an offset."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: float, style: dict[str, str] | None = None) -> None:
        self._draw, self._left, self._style = draw, left, style or {}

    def draw(self, node: ElementTree.Element) -> None:
        """Paint an element and what is in it."""
        if node.tag == "g":
            shift = re.search(rf"translate\(({NUMBER})", node.get("transform", ""))
            style = dict(part.split(":") for part in node.get("style", "").split(";") if part)
            inner = _Pen(self._draw, self._left + (float(shift[1]) if shift else 0), {**self._style, **style})
            for child in node:
                inner.draw(child)
        elif node.tag != "title":
            getattr(self, f"_{node.tag}")(node, self._look(node))

    def _look(self, node: ElementTree.Element) -> Look:
        """The look of an element with its colours resolved."""
        classes = node.get("class", "").split()
        looks = {**LOOKS, **ALTERED} if "alt" in classes else LOOKS
        look = next((looks[name] for name in classes if name in looks), Look())
        if "--l" in self._style:
            look = replace(look, fill=self._style["--li" if node.tag == "text" else "--l"])
        task = next((int(name[1]) for name in classes if re.fullmatch(r"[st][0-7]", name)), None)
        current = TASK_LIGHT[task] if task is not None else INK
        if classes[:1] == ["cell"] or (classes[:1] == ["again"] and task is not None):
            found = next((TOWERS[name] for name in classes if name in TOWERS), None)
            colour = found or (current if task is not None else SLOT)
            look = replace(look, fill=colour, opacity=0.45 if "pale" in classes else float(node.get("fill-opacity", 1)))
        if classes[:1] == ["reach"]:
            look = Look()
        return replace(
            look,
            fill=current if look.fill == "current" else look.fill,
            stroke=current if look.stroke == "current" else look.stroke,
        )

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return ((x + self._left) * SCALE, (y + MARGIN) * SCALE)

    def _line(self, node: ElementTree.Element, look: Look) -> None:
        ends = [(float(node.attrib[f"x{n}"]), float(node.attrib[f"y{n}"])) for n in (1, 2)]
        self._path([self._at(*end) for end in ends], look)

    def _polyline(self, node: ElementTree.Element, look: Look) -> None:
        self._path(self._points(node), look)

    def _polygon(self, node: ElementTree.Element, look: Look) -> None:
        self._draw.polygon(self._points(node), fill=_paint(look.fill, look))

    def _points(self, node: ElementTree.Element) -> list[tuple[float, float]]:
        pairs = (pair.split(",") for pair in node.attrib["points"].split())
        return [self._at(float(x), float(y)) for x, y in pairs]

    def _path(self, points: Sequence[tuple[float, float]], look: Look) -> None:
        pieces = [points] if look.dash is None else _dashes(points, [SCALE * part for part in look.dash])
        for piece in pieces:
            self._draw.line(
                piece, fill=_paint(look.stroke, look), width=max(1, round(look.width * SCALE)), joint="curve"
            )

    def _rect(self, node: ElementTree.Element, look: Look) -> None:
        x, y, width, height = (float(node.attrib[key]) for key in ("x", "y", "width", "height"))
        if look.fill is not None and width > 0 and height > 0:
            (left, top), (right, bottom) = self._at(x, y), self._at(x + width, y + height)
            self._draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), fill=_paint(look.fill, look))

    def _circle(self, node: ElementTree.Element, look: Look) -> None:
        x, y, radius = (float(node.attrib[key]) for key in ("cx", "cy", "r"))
        (left, top), (right, bottom) = self._at(x - radius, y - radius), self._at(x + radius, y + radius)
        outline = _paint(look.stroke, look)
        width = round(look.width * SCALE) if outline else 0
        self._draw.ellipse((left, top, right, bottom), fill=_paint(look.fill, look), outline=outline, width=width)

    def _text(self, node: ElementTree.Element, look: Look) -> None:
        """A text and its parts one after another, from the left end that its anchor asks for."""
        parts = [(node.text or "", look)]
        for child in node:
            if child.tag == "tspan":
                parts.append((child.text or "", replace(self._look(child), size=look.size)))
            parts.append((child.tail or "", look))
        drawn = [(_plain(text), part, _font(part.size)) for text, part in parts if text]
        x, y = self._at(float(node.attrib["x"]), float(node.attrib["y"]))
        length = sum(font.getlength(text) for text, _, font in drawn)
        x -= {"middle": length / 2, "end": length}.get(node.get("text-anchor", ""), 0)
        for text, part, font in drawn:
            self._draw.text((x, y), text, fill=_paint(part.fill or INK, part), font=font, anchor="ls")
            x += font.getlength(text)


def _paint(colour: str | None, look: Look) -> tuple[int, int, int, int] | None:
    if colour is None:
        return None
    red, green, blue = _rgb(colour)
    return (red, green, blue, round(255 * look.opacity))


def _rgb(colour: str) -> RGB:
    red, green, blue = ImageColor.getrgb(colour)[:3]
    return (red, green, blue)


def _font(size: float) -> Any:
    return ImageFont.load_default(size=size * SCALE)


def _plain(text: str) -> str:
    """What Pillow's own font has no sign for, in signs that it has."""
    signs = {"\N{MINUS SIGN}": "-", "\N{EN DASH}": "-", "\N{RIGHTWARDS ARROW}": "->"}
    return "".join(signs.get(char, char) for char in text)


def _dashes(points: Sequence[tuple[float, float]], dash: Sequence[float]) -> list[list[tuple[float, float]]]:
    """The drawn pieces of a dashed line."""
    pieces, drawn, left = [], True, dash[0]
    for (x, y), (to_x, to_y) in pairwise(points):
        length, done = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5, 0.0
        while length - done > 1e-6:
            step = min(left, length - done)
            if drawn:
                ends = [done / length, (done + step) / length]
                pieces.append([(x + (to_x - x) * share, y + (to_y - y) * share) for share in ends])
            done, left = done + step, left - step
            if left <= 1e-6:
                drawn = not drawn
                left = dash[0] if drawn else dash[1]
    return pieces
