"""Task orders of a sweep: seeded permutations, or lists that were given."""

import math
import random
from collections.abc import Sequence


def permutations(order: Sequence[str], count: int) -> list[list[str]]:
    """Different orders of the same tasks: first the given one, then seeded shuffles of it.

    A larger `count` only adds orders at the end, so that a sweep can grow. Lists of equal length are permuted alike.

    Raises:
        ValueError: there are not so many.
    """
    if not 1 <= count <= math.factorial(len(order)):
        raise ValueError(
            f"orders={count}: {len(order)} tasks have {math.factorial(len(order))} orders; "
            "ask for at least 1 and at most as many"
        )
    chooser = random.Random(0)
    found = [list(range(len(order)))]
    while len(found) < count:
        places = list(range(len(order)))
        chooser.shuffle(places)
        if places not in found:
            found.append(places)
    return [[order[place] for place in places] for places in found]
