"""HiDe-LLaVA: what is fused, what is weighed, and by what."""

import pytest
import torch
import torch.nn.functional as F
from dmole_model import evaluation_batches, logits, routed_logits
from stage_steps import Make

from mcit_lightning.routes import SampleGate
from mcit_lightning.strategies import HiDeConfig
from mcit_lightning.strategies.hide import FUSED


def test_experts_are_in_the_last_layer_and_fused_branches_in_all_others(steps: Make) -> None:
    run = steps("hide").learn(2)
    for path, layer in run.towers.adapters.items():
        top = "layers.1." in path
        assert isinstance(layer.gate, SampleGate) is top
        assert list(layer.lora_b) == ([] if top else [FUSED]) + ["colours", "shapes"]
    assert {path for path in run.towers.adapters if "layers.0." in path}


def test_the_fused_branch_is_the_sum_of_the_factors(steps: Make) -> None:
    run = steps("hide", fusion_weight=0.5).learn(2)
    layer = next(layer for path, layer in run.towers.adapters.items() if "layers.0." in path)
    for table in (layer.lora_a, layer.lora_b):
        assert torch.equal(table[FUSED], 0.5 * (table["colours"] + table["shapes"]))
        assert not table[FUSED].requires_grad
    x = torch.randn(2, 3, layer.in_features)
    with run.strategy.routing(run.towers, evaluation_batches(run.stream)[0], None):
        expected = layer.base(x) + layer.scale * x @ layer.lora_a[FUSED].T @ layer.lora_b[FUSED].T
        torch.testing.assert_close(layer(x), expected)


def test_after_one_task_evaluation_is_what_was_trained(steps: Make) -> None:
    run = steps("hide").learn(1)
    batch = evaluation_batches(run.stream)[0]
    at_evaluation = routed_logits(run.module, batch)
    run.strategy.routing(run.towers, batch, "colours")
    torch.testing.assert_close(logits(run.module, batch), at_evaluation)


def test_weights_are_a_softmax_of_the_mean_cosine(steps: Make) -> None:
    run = steps("hide", temperature=0.2).learn(2)
    batch = evaluation_batches(run.stream)[1]
    run.strategy.routing(run.towers, batch, None)
    image, _, text = run.strategy.key_encoder().embed(run.towers, batch)
    keys = run.strategy.selector
    cosines = [
        (
            F.cosine_similarity(image, keys.image_keys[task], dim=1)
            + F.cosine_similarity(text, keys.text_keys[task], dim=1)
        )
        / 2
        for task in ("colours", "shapes")
    ]
    expected = (torch.stack(cosines, 1) / 0.2).softmax(1)
    gate = next(layer.gate for path, layer in run.towers.adapters.items() if "layers.1." in path)
    torch.testing.assert_close(gate.value, expected)
    routed = run.strategy.routed_to()
    assert [row[0] == "shapes" for row in routed] == (expected[:, 1] > expected[:, 0]).tolist()
    assert all(sorted(row) == ["colours", "shapes"] for row in routed)


def test_a_text_only_sample_is_weighed_by_its_question_alone(steps: Make) -> None:
    run = steps("hide").learn(2)
    batch = evaluation_batches(run.stream)[0]
    without = {**batch, "num_images": [0] * len(batch["id"])}
    without["inputs"] = {key: value for key, value in batch["inputs"].items() if key != "pixel_values"}
    text = run.strategy.key_encoder().embed(run.towers, without).text
    keys = torch.stack([run.strategy.selector.text_keys[task] for task in ("colours", "shapes")])
    expected = F.cosine_similarity(text.unsqueeze(1), keys, dim=2)
    torch.testing.assert_close(run.strategy.similarities(run.towers, without), expected)


def test_validation_adds_nothing_to_the_keys(steps: Make) -> None:
    run = steps("hide").learn(1)
    stage = run.start(1)
    run.module.eval()
    run.loss(next(iter(run.stream.train_dataloader())), stage)
    assert run.strategy.selector.text_keys["shapes"].abs().sum() == 0


@pytest.mark.parametrize(
    ("key", "value"),
    [("temperature", 0.0), ("top_layers", -1), ("targets", {"vision": ["q_proj"], "language": ["q_proj"]})],
)
def test_wrong_values_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"{key}: "):
        HiDeConfig(**{key: value})
