"""Layer-wise expert allocation under a budget, and its split between the towers.

D-MoLE (Ge et al., ICML 2025): the budget B is split by the difficulty of each modality (Eq. 13-15), and the experts go to the
modules of a tower with the highest scores (Eq. 4-5). Pure functions of the scores: no model, no randomness but for the seeded
baseline.
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from typing import Literal

Difficulty = Literal["l2", "sum_of_norms"]
"""A modality's score: the norm of the gradient of all its candidates (the paper), or the sum of their norms (the code)."""

Scores = Mapping[str, float]
"""Module path -> gradient norm."""


def difficulty(scores: Mapping[str, Scores], kind: Difficulty) -> dict[str, float]:
    """Difficulty of each tower, from the scores of its candidates (tower -> scores)."""
    if kind == "sum_of_norms":
        return {tower: sum(own.values()) for tower, own in scores.items()}
    return {tower: math.sqrt(sum(value**2 for value in own.values())) for tower, own in scores.items()}


def shares(weights: Mapping[str, float]) -> dict[str, float]:
    """Each tower's share of the budget, proportional to its weight; equal shares if all weights are zero."""
    total = sum(weights.values())
    return {tower: weight / total if total else 1 / len(weights) for tower, weight in weights.items()}


def split_budget(
    budget: int, ratios: Mapping[str, float], capacity: Mapping[str, int], floor: float = 0.0
) -> dict[str, int]:
    """Whole numbers of experts per tower that add up to `budget`.

    The vision tower's share is rounded half up, kept between its floor and its capacity, and the rest goes to the language
    model; what one tower has no room for goes to the other.

    Args:
        budget: B; at most the sum of the capacities.
        ratios: tower -> share.
        capacity: tower -> candidates.
        floor: least share of the budget for the vision tower.
    """
    assert budget <= sum(capacity.values()), (budget, capacity)
    if len(capacity) == 1:
        return dict.fromkeys(capacity, budget)
    vision = max(math.floor(budget * ratios["vision"] + 0.5), math.floor(floor * budget))
    vision = max(min(vision, capacity["vision"]), budget - capacity["language"])
    return {"vision": vision, "language": budget - vision}


def ranked(scores: Scores) -> list[str]:
    """Paths by falling score; equal scores by name, in natural order."""
    return sorted(scores, key=lambda path: (-scores[path], natural(path)))


def natural(path: str) -> tuple[str | int, ...]:
    """Sort key in which layer 10 comes after layer 9."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path))


def shuffled(paths: Sequence[str], seed: str) -> list[str]:
    """A seeded random order, the baseline of `ranked`."""
    order = sorted(paths, key=natural)
    random.Random(seed).shuffle(order)
    return order


def by_layer(scores: Scores) -> dict[str, dict[str, float]]:
    """Layer -> scores of its candidates; a layer is the path up to its last number."""
    layers: dict[str, dict[str, float]] = {}
    for path, score in scores.items():
        found = re.match(r"(.*\.\d+)(\.|$)", path)
        layers.setdefault(found.group(1) if found else path, {})[path] = score
    return layers


def fill(order: Sequence[str], sizes: Mapping[str, int], room: int) -> list[str]:
    """The first paths of an order whose parameters fit into `room`; one that is too large is passed over."""
    chosen = []
    for path in order:
        if sizes[path] <= room:
            chosen.append(path)
            room -= sizes[path]
    return chosen
