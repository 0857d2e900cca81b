"""Means over seeds: golden numbers by hand and from the tables of Student's distribution."""

import math

import pytest

from mcit_lightning.comparison.statistics import estimate, paired, t_quantile


@pytest.mark.parametrize(
    ("freedom", "wanted"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (4, 2.77645), (9, 2.26216), (30, 2.04227), (200, 1.97190)],
)
def test_t_quantiles_are_those_of_the_tables(freedom: int, wanted: float) -> None:
    assert t_quantile(freedom) == pytest.approx(wanted, rel=2e-6)


def test_t_quantiles_of_another_coverage() -> None:
    assert t_quantile(5, 0.99) == pytest.approx(4.03214, rel=2e-6)
    assert t_quantile(1, 0.5) == pytest.approx(1.0)  # quartiles of Cauchy's distribution


def test_an_estimate_by_hand() -> None:
    found = estimate([1.0, 2.0, None, 6.0])
    assert found is not None and found.values == (1.0, 2.0, 6.0) and found.mean == 3.0
    assert found.deviation == pytest.approx(math.sqrt(7))  # (4 + 1 + 9) / 2
    assert found.half == pytest.approx(4.302652730 * math.sqrt(7 / 3))
    assert (found.low + found.high) / 2 == pytest.approx(3.0)


def test_one_value_has_no_interval_and_none_has_no_estimate() -> None:
    one = estimate([5.0])
    assert one is not None and one.deviation is None and one.half is None and one.low == one.high == 5.0
    assert estimate([]) is None and estimate([None]) is None


def test_pairs_are_made_by_seed_and_only_of_common_ones() -> None:
    """Values that vary far more between seeds than between methods: only pairing shows the difference."""
    base = {seed: 10.0 * seed for seed in range(4)}
    other = {seed: 10.0 * seed + 1 for seed in (3, 2, 1, 7)}
    found = paired(other, base)
    assert found is not None and found.values == (1.0, 1.0, 1.0) and found.half == pytest.approx(0.0, abs=1e-12)
    assert paired({1: None}, {1: 2.0}) is None and paired({1: 1.0}, {2: 1.0}) is None
