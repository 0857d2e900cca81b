"""O-LoRA: the penalty's value, whom it moves, and what it does to the subspaces."""

import pytest
import torch
from stage_steps import Make

from mcit_lightning.strategies import OLoRAConfig


def test_the_overlap_by_hand(steps: Make) -> None:
    for penalty, expected in (("squared", 9 + 16), ("absolute", 3 + 4)):
        run = steps("olora", penalty=penalty)
        for index in range(3):
            run.start(index)
        (layer, *others) = run.towers.adapters.values()
        with torch.no_grad():
            for other in (layer, *others):
                other.lora_a.requires_grad_(False)
                for parameter in other.lora_a.values():
                    parameter.zero_()
            layer.lora_a["colours"][0, 0] = 3.0
            layer.lora_a["shapes"][1, 2] = -2.0
            layer.lora_a["counts"][0, 0] = 1.0
            layer.lora_a["counts"][1, 2] = 2.0
        assert run.strategy.overlap([layer, *others], "counts").item() == expected


def test_the_penalty_moves_the_new_a_alone(steps: Make) -> None:
    run = steps("olora").learn(1)
    stage = run.start(1)
    layers = list(run.towers.adapters.values())
    run.module.zero_grad()
    run.strategy.overlap(layers, "shapes").backward()
    assert all(layer.lora_a["shapes"].grad.abs().sum() > 0 for layer in layers)
    assert all(p.grad is None for layer in layers for p in (layer.lora_a["colours"], layer.lora_b["colours"]))
    assert "orthogonality" in run.loss(next(iter(run.stream.train_dataloader())), stage).parts


def test_training_makes_the_subspaces_more_orthogonal(steps: Make) -> None:
    overlaps = []
    for weight in (0.0, 10.0):
        run = steps("olora", weight=weight).learn(1)
        run.train(run.start(1), steps=6)
        overlaps.append(run.strategy.overlap(list(run.towers.adapters.values()), "shapes").item())
    assert overlaps[1] < 0.5 * overlaps[0]


def test_the_norms_have_a_gradient_even_where_b_is_zero(steps: Make) -> None:
    run = steps("olora", norm_weight=0.1)
    stage = run.start(0)
    output = run.loss(next(iter(run.stream.train_dataloader())), stage)
    output.loss.backward()
    layer = next(iter(run.towers.adapters.values()))
    assert layer.lora_b["colours"].grad.isfinite().all() and layer.lora_a["colours"].grad.abs().sum() > 0


@pytest.mark.parametrize("key", ["weight", "norm_weight"])
def test_wrong_values_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key}: is -1"):
        OLoRAConfig(**{key: -1.0})
