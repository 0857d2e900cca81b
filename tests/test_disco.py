"""DISCO for one client: the weights of the tasks' LoRAs, and what they are taken from."""

import pytest
import torch
import torch.nn.functional as F
from dmole_model import evaluation_batches, logits, routed_logits
from stage_steps import Make

from mcit_lightning.strategies import DISCOConfig


def test_all_layers_mix_by_the_question_alone(steps: Make) -> None:
    run = steps("disco").learn(2)
    batch = evaluation_batches(run.stream)[1]
    run.strategy.routing(run.towers, batch, None)
    text = run.strategy.key_encoder().embed(run.towers, batch).text
    keys = torch.stack([run.strategy.selector.text_keys[task] for task in ("colours", "shapes")])
    expected = (F.cosine_similarity(text.unsqueeze(1), keys, dim=2) / 0.05).softmax(1)
    for layer in run.towers.adapters.values():
        torch.testing.assert_close(layer.gate.value, expected)
    assert all(row == ["shapes", "colours"] for row in run.strategy.routed_to())
    layer, x = next(iter(run.towers.adapters.values())), torch.randn(len(text), 3, 32)
    parts = [x @ layer.lora_a[task].T @ layer.lora_b[task].T for task in ("colours", "shapes")]
    mixed = sum(weight[:, None, None] * part for weight, part in zip(expected.T, parts, strict=True))
    torch.testing.assert_close(layer(x), layer.base(x) + layer.scale * mixed)


def test_the_image_takes_part_where_it_is_asked_to(steps: Make) -> None:
    with_image, without = (steps("disco", use_image=use).learn(2) for use in (True, False))
    batch = evaluation_batches(with_image.stream)[0]
    black = {**batch, "inputs": {**batch["inputs"], "pixel_values": torch.zeros_like(batch["inputs"]["pixel_values"])}}
    for run, same in ((with_image, False), (without, True)):
        gates = []
        for each in (batch, black):
            run.strategy.routing(run.towers, each, None)
            gates.append(next(iter(run.towers.adapters.values())).gate.value)
        assert torch.equal(*gates) is same


def test_after_one_task_evaluation_is_what_was_trained(steps: Make) -> None:
    run = steps("disco").learn(1)
    batch = evaluation_batches(run.stream)[0]
    at_evaluation = routed_logits(run.module, batch)
    run.strategy.routing(run.towers, batch, "colours")
    torch.testing.assert_close(logits(run.module, batch), at_evaluation)


@pytest.mark.parametrize(("key", "value"), [("temperature", 0.0), ("targets", {"vision": ["q_proj"]})])
def test_wrong_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}: "):
        DISCOConfig(**{key: value})
