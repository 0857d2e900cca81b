"""The task router: errors independent of the batch, thresholds from held-out samples, unknown tasks refused."""

import pytest
import torch
from torch import Tensor

from mcit_lightning.autoencoder import AutoencoderBank, Recipe
from mcit_lightning.routes import SampleGate, best_under_threshold, vote

CPU = torch.device("cpu")
RECIPE = Recipe(epochs=60, lr=3e-3, lr_end=3e-3, batch_size=32, patience=None, held_out=0.25, quantile=0.95, margin=1.5)


def clusters(tasks: int, samples: int, seed: int = 0) -> list[Tensor]:
    """Features [samples, 24] of each task: a low-dimensional structure of its own around a mean of its own."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for task in range(tasks):
        basis = torch.randn(3, 24, generator=torch.Generator().manual_seed(task))
        mean = torch.randn(24, generator=torch.Generator().manual_seed(100 + task))
        noise = 0.1 * torch.randn(samples, 24, generator=generator)
        found.append(mean + torch.randn(samples, 3, generator=generator) @ basis + noise)
    return found


def bank_of(tasks: int, *, hidden: int = 8, scaling: str = "standardize", output: str = "linear") -> AutoencoderBank:
    bank = AutoencoderBank(24, hidden, output, scaling)  # type: ignore[arg-type]
    for index, features in enumerate(clusters(tasks, 200)):
        bank.add_task(f"t{index}", CPU)
        bank.fit(f"t{index}", features, RECIPE, seed=index)
    return bank


@pytest.mark.parametrize("hidden", [8, 0], ids=["autoencoder", "nearest_centroid"])
def test_samples_find_their_task_and_unseen_tasks_are_refused(hidden: int) -> None:
    bank = bank_of(3, hidden=hidden)
    *seen, unseen = clusters(4, 100, seed=9)
    for index, features in enumerate(seen):
        errors = bank.errors(features)
        assert (errors.argmin(1) == index).float().mean() > 0.95
        assert (errors[:, index] <= bank.threshold[index]).float().mean() > 0.95
    if hidden:
        assert (bank.errors(unseen) <= bank.threshold).any(1).float().mean() < 0.05


def test_an_error_is_the_mean_square_of_the_scaled_reconstruction() -> None:
    """Worked by hand: mean 1, deviation 2, so x = 3 becomes 1; the hidden unit is 1, the output 0.25; (0.25 - 1)^2."""
    bank = AutoencoderBank(2, 1, "linear", "standardize")
    bank.add_task("t", CPU)
    bank.mean[:], bank.deviation[:] = 1.0, 2.0
    bank.w1[0, 0], bank.w2[0, :, 0] = torch.tensor([1.0, 0.0]), 0.25
    assert bank.errors(torch.tensor([[3.0, 3.0]])).tolist() == [[0.5625]]
    # without its second feature, the error is that of the first alone
    assert bank.errors(torch.tensor([[3.0, torch.nan]])).tolist() == [[0.5625]]
    assert bank.errors(torch.tensor([[3.0, 1.0]])).tolist() == [[(0.5625 + 0.0625) / 2]]


def test_errors_do_not_depend_on_the_batch() -> None:
    bank, features = bank_of(2), clusters(2, 16)[0]
    whole = bank.errors(features)
    torch.testing.assert_close(torch.cat([bank.errors(row.unsqueeze(0)) for row in features]), whole)


def test_earlier_tasks_stay_and_a_copy_is_the_same() -> None:
    bank = bank_of(2)
    before = {name: getattr(bank, name).clone() for name in bank.tensors}
    bank.add_task("t2", CPU)
    bank.fit("t2", clusters(3, 200)[2], RECIPE, seed=2)
    for name, value in before.items():
        assert torch.equal(getattr(bank, name)[:2], value)
    copy = AutoencoderBank(24, 8, "linear", "standardize")
    for task in bank.tasks:
        copy.add_task(task, CPU)
    copy.load_state_dict(bank.state_dict())
    features = clusters(1, 8)[0]
    assert torch.equal(copy.errors(features), bank.errors(features))


def test_fitting_is_seeded_and_leaves_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    one, two = bank_of(1), bank_of(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in one.tensors)


def test_the_threshold_is_a_multiple_of_the_held_out_quantile() -> None:
    features = clusters(1, 200)[0]
    bank = AutoencoderBank(24, 8, "linear", "standardize")
    bank.add_task("t", CPU)
    bank.fit("t", features, RECIPE, seed=5)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    held = bank.errors(features[order[:50]])[:, 0]
    torch.testing.assert_close(bank.threshold[0], 1.5 * held.quantile(0.95))
    # held-out errors are larger than those trained on, which is why they set the threshold
    assert held.mean() > bank.errors(features[order[50:]])[:, 0].mean()


def test_constant_and_missing_features_do_no_harm() -> None:
    features = clusters(1, 50)[0]
    features[:, 0] = 7.0
    features[:, 1:4] = torch.nan
    bank = AutoencoderBank(24, 8, "linear", "standardize")
    bank.add_task("t", CPU)
    report = bank.fit("t", features, RECIPE, seed=0)
    assert all(value == value and value < 1e3 for value in report.values())
    assert torch.isfinite(bank.errors(features)).all()


def test_patience_ends_the_training_early() -> None:
    bank = AutoencoderBank(24, 8, "sigmoid", "l2")
    bank.add_task("t", CPU)
    recipe = Recipe(
        epochs=1000, lr=0.5, lr_end=0.5, batch_size=1024, patience=10, held_out=0.25, quantile=0.95, margin=1.0
    )
    report = bank.fit("t", clusters(1, 100)[0], recipe, seed=0)
    assert 10 < report["epochs"] < 1000


def test_one_sample_is_too_few() -> None:
    bank = AutoencoderBank(4, 2, "linear", "standardize")
    bank.add_task("t", CPU)
    with pytest.raises(ValueError, match="task 't' needs at least 2"):
        bank.fit("t", torch.zeros(1, 4), RECIPE, seed=0)


ERRORS = torch.tensor([[0.1, 0.2, 0.3], [0.9, 0.2, 0.1], [0.9, 0.9, 0.9], [0.9, 0.4, 0.9]])
THRESHOLD = torch.tensor([0.5, 0.5, 0.2])


def test_the_two_best_under_their_thresholds() -> None:
    assert best_under_threshold(ERRORS, THRESHOLD, 2).tolist() == [[1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 1, 0]]
    assert best_under_threshold(ERRORS, THRESHOLD, 1).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 1, 0]]


def test_votes_decide_for_the_whole_batch() -> None:
    votes = best_under_threshold(ERRORS, THRESHOLD, 1).sum(0)
    assert votes.tolist() == [1, 1, 1]
    assert vote(votes, 0.3).tolist() == [1, 1, 0]  # a vote each: the first two
    assert vote(votes, 0.4).tolist() == [1, 0, 0]  # a third is not enough
    assert vote(torch.tensor([2.0, 1.0, 5.0]), 0.3).tolist() == [0, 0, 1]
    assert vote(torch.zeros(3), 0.0).tolist() == [0, 0, 0]


def test_beams_repeat_the_gate_of_their_sample() -> None:
    gate = SampleGate()
    gate.value = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert gate(torch.zeros(6, 3)).tolist() == [[1, 0]] * 3 + [[0, 1]] * 3
