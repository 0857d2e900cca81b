"""KeepLoRA: where A points, what is protected afterwards, and how much of it."""

import logging

import pytest
import torch
from stage_steps import Make

from mcit_lightning.loss import sample_losses
from mcit_lightning.strategies import KeepLoRAConfig
from mcit_lightning.strategies.keeplora import leading, top_right, without


def test_leading_vectors_by_hand() -> None:
    """Squared singular values 16, 9, 1: the first holds 16/26, two hold 25/26."""
    matrix = torch.diag(torch.tensor([3.0, 4.0, 1.0]))
    assert len(leading(matrix, 0.6)) == 1 and len(leading(matrix, 0.95)) == 2 and len(leading(matrix, 1.0)) == 3
    assert leading(matrix, 0.6).abs().tolist() == [[0.0, 1.0, 0.0]]
    assert len(leading(matrix, 0.6, total=52.0)) == 1, "26 of 52 are held already, so 31.2 are after one more"
    assert len(leading(matrix, 0.5, total=52.0)) == 0
    assert len(leading(torch.zeros(3, 3), 0.9)) == 0


def test_top_right_is_seeded_and_fills_up_with_zeros() -> None:
    matrix = torch.randn(5, 9)
    found = top_right(matrix, 7, seed=1)
    expected = torch.linalg.svd(matrix, full_matrices=False)[2]
    torch.testing.assert_close((found[:5] * expected).sum(1).abs(), torch.ones(5), rtol=1e-3, atol=1e-3)
    assert found[5:].abs().sum() == 0
    before = torch.random.get_rng_state()
    assert torch.equal(top_right(matrix, 7, seed=1), found) and torch.equal(torch.random.get_rng_state(), before)


def test_a_is_the_gradients_leading_direction_outside_of_what_is_protected(steps: Make) -> None:
    run = steps("keeplora", gradient_minimum=24, weight_energy=0.3)
    stage = run.start(0)
    path, layer = next(iter(run.towers.adapters.items()))
    run.module.zero_grad()
    layer.base.weight.requires_grad_(True)
    for batch in run.stream.probe_loader(24):
        (sample_losses(run.module.model, batch).sum() / 24).backward()
    layer.base.weight.requires_grad_(False)
    basis = leading(layer.base.weight, 0.3)
    torch.testing.assert_close(run.strategy.protected[path], basis)
    expected = torch.linalg.svd(without(layer.base.weight.grad, basis))[2][:2]
    torch.testing.assert_close((layer.lora_a["colours"] * expected).sum(1).abs(), torch.ones(2), rtol=1e-2, atol=1e-2)
    assert not layer.lora_a["colours"].requires_grad and layer.lora_b["colours"].requires_grad
    run.train(stage)
    assert all(parameter.grad is None for parameter in layer.base.parameters() if parameter is not layer.base.weight)


def test_a_new_task_stays_out_of_what_is_protected(steps: Make) -> None:
    """So the update of the new task does nothing to an input in the protected subspace."""
    run = steps("keeplora", weight_energy=0.2, task_energy=0.5).learn(1)
    before = {path: run.strategy.protected[path].clone() for path in run.towers.adapters}
    stage = run.start(1)
    run.train(stage)
    for path, layer in run.towers.adapters.items():
        basis = run.strategy.protected[path]
        torch.testing.assert_close(basis @ basis.T, torch.eye(len(basis)), rtol=1e-4, atol=1e-4)
        assert (layer.lora_a["shapes"] @ basis.T).abs().max() < 1e-4
        assert (basis @ layer.lora_a["shapes"].T @ layer.lora_b["shapes"].T).abs().max() < 1e-4
    run.end(stage)
    grown = [len(run.strategy.protected[path]) - len(basis) for path, basis in before.items()]
    assert min(grown) >= 0 and max(grown) > 0
    for path, basis in before.items():
        assert torch.equal(run.strategy.protected[path][: len(basis)], basis)


def test_a_module_without_free_directions_is_warned_of(steps: Make, caplog: pytest.LogCaptureFixture) -> None:
    run = steps("keeplora", weight_energy=1.0)
    with caplog.at_level(logging.WARNING):
        run.start(0)
    assert "fewer than rank=2 directions are free" in caplog.text and "weight_energy" in caplog.text


@pytest.mark.parametrize("key", ["weight_energy", "task_energy", "gradient_fraction", "gradient_minimum"])
def test_wrong_values_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: is 0"):
        KeepLoRAConfig(**{key: 0})
