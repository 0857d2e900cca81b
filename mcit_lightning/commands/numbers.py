"""Numbers on the command line."""

import argparse
from collections.abc import Callable


def at_least(lowest: int) -> Callable[[str], int]:
    """A type for `add_argument`: a whole number that is not below `lowest`."""

    def number(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = lowest - 1
        if value < lowest:
            raise argparse.ArgumentTypeError(f"is {text!r}, must be a whole number of at least {lowest}")
        return value

    return number
