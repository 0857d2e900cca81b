"""A drawing of shares that add up to one: a stacked bar per row."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from mcit_lightning.comparison.axes import text_width
from mcit_lightning.evaluation.page import shortened

ROW, BAR = 28.0, 14.0
"""Height of a row and of its bar."""


@dataclass(frozen=True)
class ShareRow:
    """A row's parts.

    Args:
        name: label.
        parts: CSS class and share of each part, from the left.
        text: behind the bar.
        title: shown when the pointer rests on the bar.
    """

    name: str
    parts: Sequence[tuple[str, float]]
    text: str
    title: str


def share_bars(rows: Sequence[ShareRow], *, width: int, title: str) -> str:
    """Draw the rows from top to bottom.

    Args:
        rows: what to draw.
        width: in CSS pixels.
        title: what a screen reader says.
    """
    names = [shortened(row.name, 18) for row in rows]
    left = max(map(text_width, names)) + 10
    right = max(text_width(row.text) for row in rows) + 12
    inner, height = width - left - right, ROW * len(rows)
    parts = [f'<svg viewBox="0 0 {width} {height:g}" width="{width}" role="img" aria-label="{escape(title)}">']
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        middle, x = ROW * (number + 0.5), left
        parts.append(f'<text class="axis" x="{left - 10:g}" y="{middle + 4:g}" text-anchor="end">{escape(name)}</text>')
        parts.append(f"<g><title>{escape(row.title)}</title>")
        for style, share in row.parts:
            own = inner * share
            if own > 0:
                size = f'width="{max(own - 2, 1):.1f}" height="{BAR:g}"'
                parts.append(f'<rect class="cell {style}" x="{x:.1f}" y="{middle - BAR / 2:g}" {size}/>')
            x += own
        parts.append(f'</g><text class="axis" x="{width - right + 12:g}" y="{middle + 4:g}">{escape(row.text)}</text>')
    return "".join([*parts, "</svg>"])
