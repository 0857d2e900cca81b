"""Colours of scores and tasks, shared by the report, the picture for TensorBoard and the table in the terminal.

The scale runs from the page to one saturated blue, so it differs in lightness alone and reads the same with any
colour vision.
"""

RGB = tuple[int, int, int]

_LIGHT: tuple[RGB, ...] = ((247, 250, 253), (188, 213, 238), (107, 164, 212), (38, 104, 171), (10, 52, 103))
_DARK: tuple[RGB, ...] = ((27, 32, 40), (28, 58, 96), (38, 98, 156), (92, 155, 212), (190, 220, 247))
_INK: RGB = (0, 0, 0)
_PAPER: RGB = (255, 255, 255)

TASK_LIGHT = ("#0068b0", "#b3540a", "#00795c", "#a8337a", "#5b5fc7", "#7a6400", "#c22f2f", "#3f4a56")
"""Line colours on a light page: at least 4.5:1 against white, apart in hue and lightness."""
TASK_DARK = ("#6db6f2", "#f0a35e", "#4fc7a1", "#e58cc0", "#a9abf5", "#d8c04a", "#f58a85", "#b6c0cb")
"""The same on a dark page."""


def score_colour(score: float, *, dark: bool = False) -> RGB:
    """Colour of a score between 0 and 100; values outside get the colour of the nearer end."""
    stops = _DARK if dark else _LIGHT
    position = min(max(score / 100.0, 0.0), 1.0) * (len(stops) - 1)
    index = min(int(position), len(stops) - 2)
    share = position - index
    low, high = stops[index], stops[index + 1]
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(low, high, strict=True))
    return (red, green, blue)


def ink(background: RGB) -> RGB:
    """Black or white, whichever reads better on a colour."""
    return max((_INK, _PAPER), key=lambda colour: contrast(colour, background))


def contrast(one: RGB, two: RGB) -> float:
    """Contrast ratio of two colours as WCAG 2 defines it, from 1 to 21."""
    high, low = sorted((_luminance(one), _luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def _luminance(colour: RGB) -> float:
    linear = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (channel / 255 for channel in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def css(colour: RGB) -> str:
    """A colour as `#rrggbb`."""
    return "#{:02x}{:02x}{:02x}".format(*colour)
