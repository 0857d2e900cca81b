"""Text of a given width, for pictures."""

from pathlib import Path
from typing import Any

from PIL import ImageFont

ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
SIZES = (13, 15, 22)


class Type:
    """A font in three sizes, and text that fits into a width.

    Args:
        file: a TrueType or OpenType file; None for Pillow's own font, which has Latin letters.

    Raises:
        ValueError: the file cannot be read as a font.
    """

    def __init__(self, file: Path | None) -> None:
        self.small, self.medium, self.large = (_font(file, size) for size in SIZES)

    def cut(self, text: str, font: Any, width: float) -> str:
        """One line of text, with an ellipsis where it does not fit."""
        text = " ".join(text.split())
        if font.getlength(text) <= width:
            return text
        return text[: _fitting(text, font, width - font.getlength(ELLIPSIS))].rstrip() + ELLIPSIS

    def wrap(self, text: str, width: float, lines: int) -> list[str]:
        """At most so many lines in small type, broken at blanks where there are any; what is left over is cut off."""
        broken: list[str] = []
        rest = " ".join(text.split())
        while rest and len(broken) < lines - 1:
            end = _fitting(rest, self.small, width)
            if end < len(rest) and rest[end] != " ":
                end = rest.rfind(" ", 0, end + 1) if " " in rest[:end] else max(1, end)
            broken.append(rest[:end])
            rest = rest[end:].lstrip()
        return [*broken, self.cut(rest, self.small, width)] if rest else broken


def _font(file: Path | None, size: int) -> Any:
    if file is None:
        return ImageFont.load_default(size=size)
    try:
        return ImageFont.truetype(str(file), size)
    except OSError as error:
        raise ValueError(f"--font: {file} cannot be read as a font ({error}); give a .ttf or .otf file") from error


def _fitting(text: str, font: Any, width: float) -> int:
    """How many characters of a text fit."""
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if font.getlength(text[:middle]) <= width else (low, middle - 1)
    return low
