"""Numbers as people read them, for the report and the terminal."""

NONE = "\N{EN DASH}"
"""Stands for a value that is not there."""
MINUS = "\N{MINUS SIGN}"


def number_text(value: float | None, *, signed: bool = False, digits: int = 1) -> str:
    """A score for reading: a real minus sign, a plus where the sign matters, a dash for None."""
    if value is None:
        return NONE
    text = f"{value:+.{digits}f}" if signed else f"{value:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else f"{0:.{digits}f}"


def count_text(value: float | None) -> str:
    """A large number for reading: 1.25 M."""
    if value is None:
        return NONE
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value:.0f}"


def seconds_text(value: float | None) -> str:
    """A duration for reading: 1 h 02 min, 3 min 20 s, 4.1 s, 12 ms, 0.4 ms."""
    if value is None:
        return NONE
    if value < 0.0995:
        return f"{1000 * value:.{0 if value >= 0.00995 else 1}f} ms"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02d} min" if hours else f"{minutes} min {seconds:02d} s"


def amount_text(value: float | None) -> str:
    """A number whose size is not known beforehand, for reading: three significant digits, 0.0740, 2.34, 1.20e−07."""
    return NONE if value is None else f"{value:#.3g}".rstrip(".").replace("-", MINUS)


def bytes_text(value: float | None) -> str:
    """A memory size for reading: 17.3 GiB."""
    if value is None:
        return NONE
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
