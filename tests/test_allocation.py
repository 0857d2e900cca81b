"""D-MoLE's budget: golden splits worked by hand, ties, layers, sizes."""

import pytest

from mcit_lightning.allocation import by_layer, difficulty, fill, natural, ranked, shares, shuffled, split_budget

HALF = {"vision": 48, "language": 48}


def test_difficulty_is_the_norm_of_the_tower_or_the_sum_of_its_norms() -> None:
    scores = {"vision": {"a": 3.0, "b": 4.0}, "language": {"c": 12.0, "d": 5.0}}
    assert difficulty(scores, "l2") == {"vision": 5.0, "language": 13.0}
    assert difficulty(scores, "sum_of_norms") == {"vision": 7.0, "language": 17.0}


def test_shares_add_up_and_survive_zero_gradients() -> None:
    assert shares({"vision": 1.0, "language": 3.0}) == {"vision": 0.25, "language": 0.75}
    assert shares({"vision": 0.0, "language": 0.0}) == {"vision": 0.5, "language": 0.5}


@pytest.mark.parametrize(
    ("share", "floor", "vision"),
    [
        (0.5, 0.0, 24),
        (0.1, 0.0, 5),
        (0.1, 0.25, 12),
        (0.26, 0.25, 12),
        (0.27, 0.25, 13),
        (0.0, 0.0, 0),
        (0.03125, 0.0, 2),
    ],
)
def test_half_of_96_modules_are_always_48_experts(share: float, floor: float, vision: int) -> None:
    """The paper's setting: 0.03125 * 48 = 1.5 is rounded up; 0.26 * 48 = 12.48 is the floor's 12; 0.27 * 48 = 12.96 is 13."""
    counts = split_budget(48, {"vision": share, "language": 1 - share}, HALF, floor)
    assert counts == {"vision": vision, "language": 48 - vision}


def test_a_full_tower_passes_its_share_on() -> None:
    assert split_budget(40, {"vision": 0.9, "language": 0.1}, {"vision": 16, "language": 32}) == {
        "vision": 16,
        "language": 24,
    }
    assert split_budget(40, {"vision": 0.0, "language": 1.0}, {"vision": 16, "language": 32}) == {
        "vision": 8,
        "language": 32,
    }
    assert split_budget(7, {"language": 1.0}, {"language": 32}) == {"language": 7}


def test_equal_scores_are_ranked_by_name_in_natural_order() -> None:
    assert ranked({"l.10.q": 1.0, "l.9.q": 1.0, "l.1.q": 2.0}) == ["l.1.q", "l.9.q", "l.10.q"]
    assert sorted(["l.10", "l.9"], key=natural) == ["l.9", "l.10"]


def test_the_random_order_depends_on_the_seed_alone() -> None:
    paths = [f"l.{index}.q" for index in range(20)]
    assert shuffled(paths, "1") == shuffled(list(reversed(paths)), "1") != shuffled(paths, "2")


def test_layers_hold_their_candidates() -> None:
    found = by_layer({"m.layers.0.a.q": 1.0, "m.layers.0.a.k": 2.0, "m.layers.11.a.q": 3.0})
    assert found == {
        "m.layers.0": {"m.layers.0.a.q": 1.0, "m.layers.0.a.k": 2.0},
        "m.layers.11": {"m.layers.11.a.q": 3.0},
    }


def test_filling_passes_over_what_does_not_fit() -> None:
    assert fill(["a", "b", "c"], {"a": 5, "b": 6, "c": 3}, 8) == ["a", "c"]
