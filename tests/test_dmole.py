"""D-MoLE on a tiny model: what a sample is given, and that nothing else in its batch matters."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dmole_model import Make, evaluation_batches, experiments_in, learn, logits, merge, new_module, routed_logits, rows
from torch import Tensor

from mcit_lightning.data.collate import EvalCollator
from mcit_lightning.features import sequence_features
from mcit_lightning.generation import generate_answers
from mcit_lightning.loss import answer_loss


@pytest.fixture
def experiment(smoke_root: Path) -> Make:
    return experiments_in(smoke_root)


def test_without_active_experts_the_logits_are_the_base_models(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 2)
    assert strategy.bank is not None
    strategy.bank.threshold.fill_(-1.0)
    base = new_module(experiment())[0]
    for batch in evaluation_batches(stream):
        assert torch.equal(routed_logits(module, batch), logits(base, batch))
        assert strategy.routed_to() == [[]] * len(batch["id"])


def test_a_new_expert_starts_as_the_base_with_the_co_expert(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 2)
    for layer in module.towers.adapters.values():
        if "shapes" in layer.lora_b:
            torch.nn.init.zeros_(layer.lora_b["shapes"])
    stream.stage = 1
    batch = next(iter(stream.train_dataloader()))
    with torch.no_grad():
        with strategy.routing(module.towers, batch, "shapes"):
            both = answer_loss(module.model, batch).loss
        with strategy.routing(module.towers, batch, "colours"):
            first = answer_loss(module.model, batch).loss
        with module.towers.pretrained():
            base = answer_loss(module.model, batch).loss
    torch.testing.assert_close(both, first)
    assert abs(both - base) > 1e-3


@pytest.mark.parametrize("router", ["autoencoder", "nearest_centroid", "oracle"])
def test_results_do_not_depend_on_the_rest_of_the_batch(router: str, experiment: Make) -> None:
    module, strategy, stream = learn(experiment(f"router: {router}", "vision_floor: 0.25"), 3)
    pad = module.processor.tokenizer.pad_token_id
    mixed = merge([rows(batch, [0, 1, 2]) for batch in evaluation_batches(stream)], pad)
    expected = routed_logits(module, mixed)
    routes = strategy.routed_to()
    assert routes is not None and len({tuple(route) for route in routes}) >= 3
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1)).tolist()
    torch.testing.assert_close(routed_logits(module, rows(mixed, order)), expected[order], rtol=1e-4, atol=1e-5)
    assert strategy.routed_to() == [routes[index] for index in order]
    torch.testing.assert_close(routed_logits(module, merge([mixed], pad, extra=5)), expected, rtol=1e-4, atol=1e-5)
    for row in (0, 4, 8):
        torch.testing.assert_close(routed_logits(module, rows(mixed, [row])), expected[[row]], rtol=1e-4, atol=1e-5)
        assert strategy.routed_to() == [routes[row]]


def test_features_do_not_depend_on_padding_unless_asked_to(experiment: Make) -> None:
    module, _, stream = new_module(experiment())
    batches = evaluation_batches(stream)
    pad = module.processor.tokenizer.pad_token_id
    for part in batches:
        alone = sequence_features(module.towers, part)
        torch.testing.assert_close(
            sequence_features(module.towers, merge([part], pad, extra=7)), alone, rtol=1e-4, atol=1e-5
        )
    lengths = {int(part["inputs"]["attention_mask"].sum(1).max()) for part in batches}
    assert len(lengths) > 1
    mixed = merge(batches, pad)
    whole = torch.cat([sequence_features(module.towers, part) for part in batches])
    torch.testing.assert_close(sequence_features(module.towers, mixed), whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sequence_features(module.towers, mixed, masked=False), whole, rtol=1e-3)


def test_training_and_evaluation_see_the_same_question(experiment: Make) -> None:
    """The answer is no part of the features: a training row and a test row of the same picture and question agree."""
    module, _, stream = new_module(experiment())
    sample = stream.split("colours", "train")[0]
    trained = sequence_features(module.towers, stream.train_collator([sample]))
    asked = EvalCollator(module.processor, stream.config.prompt)
    evaluated = sequence_features(module.towers, asked([replace(sample, turns=sample.turns[:1])]))
    torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-5)


def test_a_sample_without_an_image_is_judged_by_its_text(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 2)
    asked = EvalCollator(module.processor, stream.config.prompt)
    samples = [stream.split("colours", "test")[0], replace(stream.split("shapes", "test")[0], images=())]
    batch = asked(samples)
    features = strategy.features(module.towers, batch)
    assert features[1, :32].isnan().all() and not features[1, 32:].isnan().any() and not features[0].isnan().any()
    mixed = routed_logits(module, batch)
    torch.testing.assert_close(routed_logits(module, asked(samples[1:])), mixed[1:], rtol=1e-4, atol=1e-5)


def test_the_layer_equals_a_loop_over_its_experts(experiment: Make) -> None:
    module, _, stream = learn(experiment("vision_floor: 0.25", "router: oracle", "co_expert: none"), 3)
    batch = merge([rows(part, [0, 1]) for part in evaluation_batches(stream)], module.processor.tokenizer.pad_token_id)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        layer.register_forward_hook(lambda _, args, output, path=path: seen.__setitem__(path, (args[0], output)))  # type: ignore[misc]
        for path, layer in module.towers.adapters.items()
    ]
    routed_logits(module, batch)
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(module.towers.adapters) > 8
    for path, (x, y) in seen.items():
        layer = module.towers.adapters[path]
        with torch.no_grad():
            expected = layer.base(x)
            for row, task in enumerate(batch["task"]):
                if task in layer.lora_b:
                    expected[row] += 2.0 * x[row] @ layer.lora_a[task].T @ layer.lora_b[task].T
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_the_co_expert_is_looked_up_once_per_sample(experiment: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module, strategy, stream = learn(experiment(), 2)
    stream.stage = 1
    calls = []
    measure = strategy.features
    monkeypatch.setattr(strategy, "features", lambda *args: calls.append(1) or measure(*args))
    for _ in range(2):
        for batch in stream.train_dataloader():
            with strategy.routing(module.towers, batch, "shapes"):
                pass
            assert strategy._active is not None and (strategy._active[:, 1] == 1).all()
            assert (strategy._active.sum(1) == 2).all()
    assert len(calls) == len(stream.train_dataloader())


def test_co_experts_come_from_earlier_tasks_under_their_rule(experiment: Make) -> None:
    errors, own = torch.tensor([[0.3, 0.2, 0.1], [0.9, 0.8, 0.1], [0.1, 0.1, 0.1]]), torch.tensor([2, 2, 0])
    for rule, expected in (("best", [1, 1, -1]), ("thresholded", [1, -1, -1])):
        _, strategy, _ = learn(experiment(f"co_expert: {rule}"), 3)
        assert strategy.bank is not None
        strategy.bank.threshold.fill_(0.5)
        assert strategy._co_expert(errors, own).tolist() == expected


def test_a_vote_depends_on_the_batch_and_says_so(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("route_scope: batch_vote"), 3)
    parts = evaluation_batches(stream)
    mixed = merge([rows(parts[0], [0, 1, 2]), rows(parts[2], [0])], module.processor.tokenizer.pad_token_id)
    routed_logits(module, mixed)
    routes = strategy.routed_to()
    assert routes is not None and len({tuple(route) for route in routes}) == 1


def test_beams_keep_their_samples_experts(experiment: Make) -> None:
    module, _, stream = learn(experiment("router: oracle", "vision_floor: 0.25"), 3)
    batch = merge([rows(part, [0]) for part in evaluation_batches(stream)], module.processor.tokenizer.pad_token_id)

    def beams(part: dict[str, Any]) -> Tensor:
        with module.strategy.routing(module.towers, part, None):
            return module.model.generate(  # type: ignore[operator]
                **part["inputs"], max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=-1
            )

    together = beams(batch)
    for row in range(3):
        assert torch.equal(beams(rows(batch, [row])), together[[row]])


def test_answers_are_those_of_batch_size_one(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 3)
    end = stream.train_collator.encoder.end_id
    mixed = merge([rows(part, [0, 1]) for part in evaluation_batches(stream)], module.processor.tokenizer.pad_token_id)

    def answers(batch: dict[str, Any]) -> list[str]:
        with strategy.routing(module.towers, batch, None):
            return generate_answers(module.model, module.processor, batch["inputs"], 5, end)

    assert answers(mixed) == [answers(rows(mixed, [row]))[0] for row in range(6)]


@pytest.mark.parametrize("size", [0, 1000])
def test_features_of_test_samples_are_computed_once_per_run(
    size: int, experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, strategy, stream = learn(experiment(f"feature_cache: {size}"), 3)
    calls = []
    measure = strategy.features
    monkeypatch.setattr(strategy, "features", lambda *args: calls.append(1) or measure(*args))
    batches = evaluation_batches(stream)
    first = [routed_logits(module, batch) for batch in batches]
    routes = strategy.routed_to()
    for batch, expected in zip(batches, first, strict=True):
        assert torch.equal(routed_logits(module, batch), expected)
    assert strategy.routed_to() == routes
    assert len(calls) == (len(batches) if size else 2 * len(batches))


def test_only_experts_that_a_batch_uses_are_computed(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 3)
    batch = evaluation_batches(stream)[0]
    expected = routed_logits(module, batch)
    used = {task for row in strategy.routed_to() or [] for task in row}
    assert used and used != set(strategy.tasks), "the batch must leave an expert unused, else this shows nothing"
    for layer in module.towers.adapters.values():
        for name in set(layer.lora_b) - used:
            layer.lora_b[name].data.fill_(torch.nan)
    assert torch.equal(routed_logits(module, batch), expected)
