"""A grid as inline SVG: a column per module, grouped by layer, small enough for hundreds of modules.

Colours come from the page's CSS classes; what a cell means is its title, which is shown when the pointer rests on it.
"""

from dataclasses import dataclass
from html import escape

from mcit_lightning.evaluation.placement import TowerModules

TOWER_NAMES = {"vision": "Vision tower", "language": "Language model"}
"""Headings of the maps."""
WIDTH = 900
"""Width in CSS pixels that a map tries to fit into."""
SMALLEST, LARGEST = 5.0, 22.0
"""Least and largest width of a column."""
ROW = 20
"""Height of a row."""
HEAD = 18
"""Height of the line with the numbers of the layers."""
BARS = 44
"""Height of the bars below the rows."""


@dataclass(frozen=True)
class Cell:
    """A cell of the grid.

    Args:
        style: CSS classes; empty for a slot that is not filled.
        title: what it means.
        dot: CSS classes of a dot on it; empty for none.
        share: how much of the slot's colour is covered, from 0 to 1.
    """

    style: str
    title: str
    dot: str = ""
    share: float = 1.0


@dataclass(frozen=True)
class ModuleMap:
    """A drawn map.

    Args:
        html: for a page, with the names of the rows beside the drawing, so that they stay where it scrolls.
        picture: an SVG with the names in it.
    """

    html: str
    picture: str


def draw_map(
    layers: list[tuple[str, int]],
    rows: list[tuple[str, list[Cell | None]]],
    *,
    title: str,
    bars: list[tuple[int, str]] | None = None,
    highest: int = 1,
    style: str = "",
) -> ModuleMap:
    """Draw a grid with the names of its rows beside it; what does not fit the page scrolls, the names stay.

    Args:
        layers: label of each layer and how many columns it has.
        rows: name and cells; None leaves a cell out.
        title: what a screen reader says.
        bars: a number per column with its title, drawn as a bar below the rows.
        highest: the number that a full bar stands for.
        style: CSS class of the bars.
    """
    count = sum(size for _, size in layers)
    pitch = min(max((WIDTH - 4 * len(layers)) / count, SMALLEST), LARGEST) // 0.5 * 0.5
    gap = 8.0 if pitch >= 12 else 3.0
    starts, edges, x = [], [], 0.0
    for _, size in layers:
        starts.append(x)
        edges += [x + pitch * index for index in range(size)]
        x += pitch * size + gap
    bottom = HEAD + ROW * len(rows)
    width, height = max(x - gap, 1.0), bottom + (BARS if bars else 0)
    parts = [_labels(layers, starts)]
    own = pitch - (2 if pitch >= 8 else 1)
    for number, (_, cells) in enumerate(rows):
        y = HEAD + ROW * number
        parts += [_cell(cell, left, y, own) for left, cell in zip(edges, cells, strict=True) if cell is not None]
    if bars:
        parts.append(f'<line class="grid" x1="0" x2="{width:g}" y1="{height - 0.5}" y2="{height - 0.5}"/>')
        parts += [
            _bar(value / highest, text, left, bottom, own, style)
            for left, (value, text) in zip(edges, bars, strict=True)
        ]
    names = "".join(f'<span title="{escape(name)}">{escape(name)}</span>' for name, _ in rows)
    if bars:
        names += f'<span class="sum">Chosen (of {highest})</span>'
    inner, about = "".join(parts), f'role="img" aria-label="{escape(title)}"'
    svg = f'<svg viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}" {about}>{inner}</svg>'
    html = f'<div class="map"><div class="rows">{names}</div><div class="scroll">{svg}</div></div>'
    return ModuleMap(html, _with_names([name for name, _ in rows], inner, width, height, about))


def _with_names(names: list[str], inner: str, width: float, height: int, about: str) -> str:
    left = 7 * max(map(len, names), default=0) + 12
    texts = "".join(
        f'<text class="axis" x="{left - 8}" y="{HEAD + ROW * number + 13}" text-anchor="end">{escape(name)}</text>'
        for number, name in enumerate(names)
    )
    return (
        f'<svg viewBox="0 0 {left + width:g} {height}" width="{left + width:g}" {about}>{texts}'
        f'<g transform="translate({left},0)">{inner}</g></svg>'
    )


def columns_text(modules: TowerModules) -> str:
    """What the columns of a tower's map are, as HTML."""
    kinds = modules.kinds()
    order = f" In each layer: {escape(', '.join(kinds))}." if kinds and len(kinds) > 1 else ""
    below = f"<code>{escape(modules.prefix.rstrip('.'))}</code>" if modules.prefix else "the model"
    return f"A column is a module below {below}; the numbers are layers.{order}"


def _labels(layers: list[tuple[str, int]], starts: list[float]) -> str:
    """The layers' numbers, as many as have room."""
    shown, free = [], -1.0
    for (label, _), x in zip(layers, starts, strict=True):
        if x >= free:
            shown.append(f'<text class="axis" x="{x:g}" y="12">{escape(label)}</text>')
            free = x + 7 * len(label) + 8
    return "".join(shown)


def _cell(cell: Cell, x: float, y: float, width: float) -> str:
    kind = f"cell {cell.style}" if cell.style else "cell"
    title = f"<title>{escape(cell.title)}</title>"
    place = f'x="{x:g}" y="{y}" width="{width:g}" height="{ROW - 2}"'
    box = f'<rect class="{kind}" {place}>{title}</rect>'
    if cell.share < 1:
        box = f'<rect class="cell" {place}/><rect class="{kind}" {place} fill-opacity="{cell.share:.2f}">{title}</rect>'
    if not cell.dot:
        return box
    radius = min(3.0, width / 2 - 0.5)
    return f'{box}<circle class="again {cell.dot}" cx="{x + width / 2:g}" cy="{y + ROW / 2 - 1:g}" r="{radius:g}"/>'


def _bar(share: float, text: str, x: float, top: int, width: float, style: str) -> str:
    """A bar that stands on the bottom line; an unseen box of full height makes its title easy to reach."""
    room = BARS - 10
    height = room * share
    y = top + BARS - 1 - height
    return (
        f'<g><title>{escape(text)}</title><rect class="reach" x="{x:g}" y="{top + 10}" width="{width:g}" height="{room}"/>'
        f'<rect class="cell {style}" x="{x:g}" y="{y:.1f}" width="{width:g}" height="{height:.1f}"/></g>'
    )
