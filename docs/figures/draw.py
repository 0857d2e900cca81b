"""Draws the figures of the documentation from `figures.txt`: `python docs/figures/draw.py` writes an SVG for each entry.

An entry of `figures.txt` starts with its name in brackets, then `key: value` lines:

    formula    the line above the drawing
    column     a task: `header > rows`, rows from top to bottom separated by `|`, cells of a row by spaces
    answer     the evaluation of a sample, as a column
    route      how many rows of the answer lines lead into, from the sample (default: down to the last row of several cells)
    legend     other texts in the legend, as cells
    learn, ask lines below the columns and below the answer, `/` breaks them

The first character of a cell is what it is (`KINDS`), `_` is a space in its text and `__` a `_`, `.` is an empty cell. A row
that starts with a backquote is text without cells.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

WIDTH, GAP, ROW, LINE, TOP = 360, 8, 22, 15, 48
KINDS = {
    "+": ("trains", "trains"),
    "=": ("frozen", "frozen"),
    "!": ("used", "answers"),
    "?": ("routes", "routes"),
    "~": ("kept", "kept aside"),
    "-": ("unused", "takes no part"),
}
"""First character of a cell -> its class in the drawing, and its name in the legend."""

STYLE = """
text { font: 12px system-ui, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif; fill: #1f2328; }
.small { font-size: 11px; } .quiet { fill: #59636e; } .middle { text-anchor: middle; } .line { stroke: #59636e; fill: none; }
rect { stroke-width: 1.2; } .trains { fill: #2563eb; stroke: #2563eb; } .frozen { fill: #d8dde3; stroke: #d8dde3; }
.used { fill: #a7e3bd; stroke: #15803d; } .routes { fill: #e3d5fb; stroke: #8250df; } .kept { fill: #fbe3a6; stroke: #b7791f; }
.sample { fill: none; stroke: #59636e; }
.unused { fill: none; stroke: #9aa4af; stroke-dasharray: 3 2; } text.on-trains { fill: #fff; } text.on-unused { fill: #59636e; }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3; } .quiet, text.on-unused { fill: #9aa4af; } .line, .sample { stroke: #9aa4af; }
.trains { fill: #58a6ff; stroke: #58a6ff; } text.on-trains { fill: #0d1117; } .frozen { fill: #3d444d; stroke: #3d444d; }
.used { fill: #1b4d2e; stroke: #3fb950; } .routes { fill: #3c2a5e; stroke: #ab7df8; } .kept { fill: #4d3a10; stroke: #d29922; }
.unused { stroke: #6e7681; } }
"""

Cell = tuple[str, str, float, float]
"""Kind, text, left edge and width."""
Figure = dict[str, list[str]]
"""Key -> its values, in order."""


def read_figures(text: str) -> dict[str, Figure]:
    """Name -> key -> its values in order. Raises ValueError for a line that is none of an entry."""
    figures: dict[str, Figure] = {}
    name = ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.startswith("["):
            name = line.strip("[]")
            figures[name] = {}
        elif line.strip() and not line.startswith("#"):
            key, separator, value = line.partition(":")
            if not separator or not name:
                raise ValueError(f"figures.txt, line {number}: {line!r} is no `key: value` line of an entry")
            figures[name].setdefault(key.strip(), []).append(value.strip())
    return figures


def draw(figure: Figure) -> str:
    """The SVG of an entry."""
    tasks, answer = ([value.partition(">")[::2] for value in figure.get(key, [])] for key in ("column", "answer"))
    columns = [(header.strip(), [row.strip() for row in rows.split("|")]) for header, rows in tasks + answer]
    widths = _widths(len(tasks), len(answer))
    routed = [_routed(figure, rows) if place >= len(tasks) else 0 for place, (_, rows) in enumerate(columns)]
    deep = [_heights(rows, 0, depth)[0 if depth else 1] for (_, rows), depth in zip(columns, routed, strict=True)]
    bottom = TOP - min(deep)
    out = [_text(WIDTH / 2, 14, text, "middle") for text in figure.get("formula", [])]
    left, places, kinds = 4.0, [], set()
    for (header, rows), width, depth in zip(columns, widths, routed, strict=True):
        places.append(left)
        out.append(_text(left + width / 2, 34, header, "middle quiet small"))
        laid, edges = [_cells(row, left, width) for row in rows], _heights(rows, bottom, depth)
        if depth:
            out += _routes(laid[:depth], edges, left + width / 2)
        for cells, y in zip(laid, edges[1:], strict=True):
            out += [part for cell in cells for part in _cell(cell, y)]
            kinds |= {cell[0] for cell in cells}
        left += width + GAP
    if len(tasks) > 1 and answer:
        out.append(f'<path class="line" d="M{places[0]:.1f} 40H{places[len(tasks)] - GAP:.1f}m-5 -3l5 3l-5 3"/>')
    notes = [figure.get(key, [""])[0].split("/") for key in ("learn", "ask")]
    for note, x in zip(notes, (4.0, places[-1]), strict=True):
        out += [_text(x, bottom + 13 + 15 * index, line.strip(), "small") for index, line in enumerate(note) if line]
    y = bottom + 18 + 15 * max(map(len, notes))
    named = {cell[0]: _plain(cell[1:]) for cell in figure.get("legend", [""])[0].split()}
    out += _legend({kind: named.get(kind, text) for kind, (_, text) in KINDS.items() if kind in kinds}, y)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10:g}" width="{WIDTH * 1.5:g}">'
    return "\n".join([head, f"<style>{STYLE}</style>", *out, "</svg>", ""])


def _widths(columns: int, answers: int) -> list[float]:
    """Widths of the columns; evaluation has as much as two of three tasks."""
    space = WIDTH - 8 - GAP * (columns + answers - 1)
    wide = 0.36 * space if columns and answers else space / max(answers, 1)
    return [(space - wide * answers) / columns] * columns + [wide] * answers if columns else [wide] * answers


def _cells(row: str, left: float, width: float) -> list[Cell]:
    """The cells of a row, side by side."""
    if row.startswith("`"):
        return [("`", row[1:], left, width)]
    parts = row.split()
    each = (width - 3 * (len(parts) - 1)) / max(len(parts), 1)
    laid = [(part[0], _plain(part[1:]), left + i * (each + 3), each) for i, part in enumerate(parts)]
    return [cell for cell in laid if cell[0] != "."]


def _cell(cell: Cell, y: float) -> list[str]:
    kind, text, left, width = cell
    if kind == "`":
        return [_text(left + width / 2, y + 15, text, "middle small quiet")]
    name = KINDS[kind][0]
    box = f'<rect class="{name}" x="{left:.1f}" y="{y:g}" width="{width:.1f}" height="{ROW}" rx="4"/>'
    return [box, _text(left + width / 2, y + 15, text, f"middle small on-{name}")]


def _heights(rows: list[str], bottom: float, routed: int) -> list[float]:
    """Upper edge of each row, and of what is above the first one; there is room for lines above the first `routed` rows."""
    edges = [bottom - ROW - 5]
    for index in range(len(rows) - 1, 0, -1):
        edges.append(edges[-1] - ROW - (LINE if index < routed else 5))
    return [edges[-1] - ROW + 4 - LINE, *reversed(edges)]


def _routed(figure: Figure, rows: list[str]) -> int:
    """How many rows lines lead into."""
    several = [index + 1 for index, row in enumerate(rows) if len(row.split()) > 1]
    return int(figure["route"][0]) if "route" in figure else max(several, default=1)


def _routes(laid: list[list[Cell]], edges: list[float], middle: float) -> list[str]:
    """The sample, and the lines from it to the cells that take part: to those below it, or to all from a single cell."""
    out = [f'<rect class="sample" x="{middle - 14:.1f}" y="{edges[0]:g}" width="28" height="{ROW - 4}" rx="9"/>']
    out.append(_text(middle, edges[0] + 13, "x", "middle small"))
    above: list[Cell] = [("!", "x", middle - 14, 28.0)]
    for index, cells in enumerate(laid):
        below = [cell for cell in cells if cell[0] in "!?"]
        start = edges[index] + (ROW if index else ROW - 4)
        for one in above:
            for two in below:
                if len(above) == 1 or (one[2] < two[2] + two[3] and two[2] < one[2] + one[3]):
                    x, to = one[2] + one[3] / 2, two[2] + two[3] / 2
                    out.append(f'<path class="line" d="M{x:.1f} {start:g}L{to:.1f} {edges[index + 1]:g}"/>')
        above = below
    return out


def _legend(texts: dict[str, str], y: float) -> list[str]:
    """Kind -> text, in one line."""
    out, x = [], 4.0
    for kind, text in texts.items():
        out.append(f'<rect class="{KINDS[kind][0]}" x="{x:.1f}" y="{y - 8:g}" width="10" height="10" rx="2"/>')
        out.append(_text(x + 14, y + 1, text, "small quiet"))
        x += 24 + 6.1 * len(text)
    return out


def _plain(text: str) -> str:
    return text.replace("__", "\0").replace("_", " ").replace("\0", "_")


def _text(x: float, y: float, text: str, style: str) -> str:
    return f'<text class="{style}" x="{x:.1f}" y="{y:g}">{escape(text)}</text>'


def main() -> None:
    """Write all figures beside this file."""
    folder = Path(__file__).parent
    for name, figure in read_figures((folder / "figures.txt").read_text(encoding="utf-8")).items():
        (folder / f"{name}.svg").write_text(draw(figure), encoding="utf-8")


if __name__ == "__main__":
    main()
