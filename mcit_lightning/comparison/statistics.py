"""Means over seeds, with what can be said about them from a handful of runs.

Intervals are t-intervals: mean ± t(n - 1) * s / sqrt(n), where s is the standard deviation over seeds (divisor n - 1) and t the
quantile of Student's distribution (Student, "The probable error of a mean", Biometrika 1908). They describe what another seed
would change: initial adapters, the order of samples and, where `data.limit_*` or `data.fraction` is set, which rows are drawn;
without a limit the test rows are always the same, and what others would change is not in the interval. With two seeds t is
12.7: such an interval is honest and says almost nothing. Differences between methods are taken seed by seed, because runs with
the same seed have the same rows in the same order.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95
"""Coverage of all intervals."""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Args:
        values: one per seed, in the order of the seeds.
        mean: their mean.
        deviation: standard deviation with divisor n - 1; None for one value.
        half: half the width of the t-interval; None for one value.
    """

    values: tuple[float, ...]
    mean: float
    deviation: float | None
    half: float | None

    @property
    def low(self) -> float:
        """Lower end of the interval; the mean where there is none."""
        return self.mean - (self.half or 0.0)

    @property
    def high(self) -> float:
        """Upper end of the interval; the mean where there is none."""
        return self.mean + (self.half or 0.0)


def estimate(values: Sequence[float | None]) -> Estimate | None:
    """Mean, deviation and interval of the values that are there; None if none is."""
    known = tuple(value for value in values if value is not None)
    if not known:
        return None
    mean = statistics.fmean(known)
    if len(known) < 2:
        return Estimate(known, mean, None, None)
    deviation = statistics.stdev(known)
    return Estimate(known, mean, deviation, t_quantile(len(known) - 1) * deviation / math.sqrt(len(known)))


def paired(one: Mapping[int, float | None], two: Mapping[int, float | None]) -> Estimate | None:
    """Estimate of `one - two` over the seeds that have both; None if there is no such seed.

    Args:
        one: seed -> value of a method.
        two: likewise of the method that it is compared with.
    """
    common = sorted(one.keys() & two.keys())
    return estimate([a - b for seed in common if (a := one[seed]) is not None and (b := two[seed]) is not None])


def t_quantile(freedom: int, confidence: float = CONFIDENCE) -> float:
    """Two-sided quantile of Student's t: P(|T| <= t) = confidence, by bisection to 1e-9.

    Args:
        freedom: degrees of freedom, at least 1.
        confidence: between 0 and 1.
    """
    assert freedom >= 1 and 0 < confidence < 1, (freedom, confidence)
    low, high = 0.0, 1.0
    while _within(high, freedom) < confidence:
        high *= 2
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return (low + high) / 2


def _within(t: float, freedom: int) -> float:
    """P(|T| <= t), in closed form for whole degrees of freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2 == 1
    term = cosine if odd else 1.0
    total = 0.0
    for k in range(2 if odd else 1, freedom, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
