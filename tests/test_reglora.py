"""RegLoRA: which elements are the keys, what the regularisation costs, and what it keeps small."""

import pytest
import torch
from stage_steps import Make

from mcit_lightning.strategies import RegLoRAConfig


def test_the_key_elements_are_the_largest_of_the_update(steps: Make) -> None:
    run = steps("reglora", key_fraction=0.01).learn(1)
    for path, layer in run.towers.adapters.items():
        update = (layer.lora_b["colours"] @ layer.lora_a["colours"]).abs().flatten()
        keys = run.strategy.keys[f"{path}.colours"].long()
        assert len(keys) == len(keys.unique()) == int(0.01 * update.numel())
        rest = torch.ones_like(update, dtype=torch.bool)
        rest[keys] = False
        assert update[keys].min() >= update[rest].max()


def test_the_regularisation_by_hand(steps: Make) -> None:
    """Two earlier tasks with one key each: the mean of |update| there, a shared key twice."""
    run = steps("reglora", rank=1, key_fraction=1e-6)
    for index in range(3):
        run.start(index)
    path, layer = next(iter(run.towers.adapters.items()))
    width = layer.in_features
    for parameter in (layer.lora_a["counts"], layer.lora_b["counts"]):
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        layer.lora_b["counts"][1, 0], layer.lora_a["counts"][0, 2], layer.lora_a["counts"][0, 3] = 2.0, -3.0, 0.5
    for task, column in (("colours", 2), ("shapes", 3)):
        run.strategy.keys[f"{path}.{task}"] = torch.tensor([width + column], dtype=torch.int32)
    assert run.strategy.key_size({path: layer}, "counts").item() == pytest.approx((6 + 1) / 2)
    run.strategy.keys[f"{path}.shapes"] = torch.tensor([width + 2], dtype=torch.int32)
    assert run.strategy.key_size({path: layer}, "counts").item() == pytest.approx(6)
    assert run.strategy.key_size({path: layer}, "shapes").item() == 0, "only tasks before it count"


def test_a_new_update_stays_small_at_the_keys(steps: Make) -> None:
    sizes = []
    for weight in (0.0, 2500.0):
        run = steps("reglora", weight=weight).learn(1)
        stage = run.start(1)
        run.train(stage, steps=6)
        sizes.append(run.strategy.key_size(run.towers.adapters, "shapes").item())
        assert "key_elements" in run.loss(next(iter(run.stream.train_dataloader())), stage).parts
    assert sizes[1] < 0.7 * sizes[0]


@pytest.mark.parametrize(("key", "value"), [("weight", -1.0), ("key_fraction", 0.0)])
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}: is {value}"):
        RegLoRAConfig(**{key: value})
