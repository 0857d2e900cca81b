"""The figures of a comparison: put on the page, and kept for the other places that show them."""

from collections.abc import Callable
from html import escape

WIDE, NARROW = 1000, 360
"""Widths in CSS pixels at which a figure's text has its natural size: on a desktop, on a phone."""


class Gallery:
    """Collects the figures of a page by their names."""

    def __init__(self) -> None:
        self.figures: dict[str, str] = {}
        """Name -> SVG, in the order of the page."""

    def add(self, name: str, svg: str, *, shown: str | None = None) -> str:
        """A figure of one size, as HTML.

        Args:
            name: letters, digits and `/`; once only.
            svg: the drawing.
            shown: what the page shows instead (HTML with the same drawing in it).
        """
        assert name not in self.figures, name
        self.figures[name] = svg
        return f'<figure data-figure="{escape(name)}">{shown or svg}</figure>'

    def add_sizes(self, name: str, draw: Callable[[int], str], *, wide: int = WIDE, below: str = "") -> str:
        """A figure that is drawn for a wide page and for a phone, as HTML.

        Args:
            name: as `add`.
            draw: from the width in CSS pixels to the drawing.
            wide: the width on a wide page.
            below: HTML that only a phone shows, such as a legend.
        """
        large = draw(wide)
        shown = f'<div class="wide">{large}</div><div class="narrow">{draw(NARROW)}{below}</div>'
        return self.add(name, large, shown=shown)
