"""D-MoLE on a tiny model: what is allocated, what a sample is given, and that nothing else in its batch matters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.features import sequence_features
from mcit_lightning.generation import generate_answers
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.loss import answer_loss, sample_losses
from mcit_lightning.module import MCITModule
from mcit_lightning.probe import gradient_scores
from mcit_lightning.stages import sequential_stages
from mcit_lightning.strategies import DMoLE
from mcit_lightning.validation import build_strategy

TASKS = ["colours", "shapes", "counts"]
STAGES = sequential_stages(TASKS)
Make = Callable[..., ExperimentConfig]


@pytest.fixture
def experiment(smoke_root: Path) -> Make:
    def make(*strategy: str) -> ExperimentConfig:
        node = ", ".join(("name: dmole", "rank: 4", "alpha: 8", "dropout: 0.0", *strategy))
        overrides = [f"data.root={smoke_root}", "prepare=null", f"strategy={{{node}}}"]
        return load_config(experiments_dir() / "dmole_smoke.yaml", overrides)

    return make


def new_module(config: ExperimentConfig) -> tuple[MCITModule, DMoLE, ContinualDataModule]:
    module = MCITModule(load_backbone(config.backbone), build_strategy(config.strategy), config).eval()
    assert isinstance(module.strategy, DMoLE)
    return module, module.strategy, ContinualDataModule(config, module.processor, STAGES)


def learn(config: ExperimentConfig, stages: int, *, std: float = 0.2) -> tuple[MCITModule, DMoLE, ContinualDataModule]:
    """Some stages as the callbacks would start them, with random scores and random experts, in evaluation mode."""
    module, strategy, stream = new_module(config)
    for stage in STAGES[:stages]:
        stream.stage = stage.index
        generator = torch.Generator().manual_seed(stage.index)
        paths = [path for paths in strategy.candidates(module.towers).values() for path in paths]
        strategy.scores = dict(zip(paths, torch.rand(len(paths), generator=generator).tolist(), strict=True))
        module.grow(strategy.plan(stage, module.towers))
        if strategy.needs_router:
            parts = [strategy.features(module.towers, batch) for batch in stream.probe_loader(24)]
            strategy.fit_router(stage, torch.cat(parts))
    torch.manual_seed(0)
    for layer in module.towers.adapters.values():
        for parameter in layer.lora_b.values():
            torch.nn.init.normal_(parameter, std=std)
    return module, strategy, stream


def evaluation_batches(stream: ContinualDataModule) -> list[dict[str, Any]]:
    stream.evaluate_only(TASKS)
    return [next(iter(loader)) for loader in stream.test_dataloader()]


def left(tensor: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (length - tensor.shape[1], 0), value=value)


def merge(parts: list[dict[str, Any]], pad: int, extra: int = 0) -> dict[str, Any]:
    """Evaluation batches as one, left-padded to the longest and `extra` columns more."""
    length = max(part["inputs"]["input_ids"].shape[1] for part in parts) + extra
    inputs = {
        "input_ids": torch.cat([left(part["inputs"]["input_ids"], length, pad) for part in parts]),
        "attention_mask": torch.cat([left(part["inputs"]["attention_mask"], length, 0) for part in parts]),
        "pixel_values": torch.cat([part["inputs"]["pixel_values"] for part in parts]),
    }
    lists = {key: [value for part in parts for value in part[key]] for key in ("task", "id", "num_images")}
    return {"inputs": inputs, **lists}


def rows(batch: dict[str, Any], index: list[int]) -> dict[str, Any]:
    inputs = {key: value[index] for key, value in batch["inputs"].items()}
    return {"inputs": inputs, **{key: [batch[key][i] for i in index] for key in ("task", "id", "num_images")}}


def logits(module: MCITModule, batch: dict[str, Any]) -> Tensor:
    """[B, vocabulary] after the prompt, by whatever gates are set."""
    positions = (batch["inputs"]["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return module.model(**batch["inputs"], position_ids=positions).logits[:, -1]


def routed_logits(module: MCITModule, batch: dict[str, Any]) -> Tensor:
    with module.strategy.routing(module.towers, batch, None):
        return logits(module, batch)


# ------------------------------------------------------------------------------------------------------------- allocation


@pytest.mark.parametrize(
    "option", ["budget: 0.5", "budget: 0.3", "vision_floor: 0.25", "difficulty: sum_of_norms", "curriculum: false"]
)
def test_exactly_the_budget_is_allocated_to_the_best_of_each_tower(option: str, experiment: Make) -> None:
    module, strategy, _ = learn(experiment(option), 1)
    plan = module.structure.plan("colours")
    assert plan is not None and strategy.scores is not None
    budget = int(strategy.config.budget * 16 + 0.5)
    assert len(plan.ranks) == sum(plan.extra["budget"].values()) == budget
    for tower, paths in strategy.candidates(module.towers).items():
        inside = [path for path in paths if path in plan.ranks]
        assert len(inside) == plan.extra["budget"][tower]
        outside = [strategy.scores[path] for path in paths if path not in plan.ranks]
        assert not inside or not outside or min(strategy.scores[path] for path in inside) >= max(outside)


def test_layers_as_units_random_and_uniform_allocation(experiment: Make) -> None:
    module, _, _ = learn(experiment("unit: layer"), 1)
    plan = module.structure.plan("colours")
    assert (
        plan is not None
        and len(plan.ranks) == 8
        and len({path.rpartition(".layers.")[2][0] for path in plan.ranks}) <= 2
    )
    layers = [path.rpartition(".")[0] for path in plan.ranks]
    assert {layers.count(layer) for layer in layers} <= {3, 4, 1} and set(plan.ranks.values()) == {4}
    random, again = (learn(experiment("allocation: random"), 2)[0] for _ in range(2))
    assert random.structure.to_list() == again.structure.to_list()
    assert random.structure.plan("colours").ranks.keys() != random.structure.plan("shapes").ranks.keys()  # type: ignore[union-attr]
    uniform = learn(experiment("allocation: uniform"), 1)[0].structure.plan("colours")
    assert uniform is not None and len(uniform.ranks) == 16 and set(uniform.ranks.values()) == {2}


def test_a_budget_of_parameters_is_kept_and_used(experiment: Make) -> None:
    module, strategy, _ = learn(experiment("budget_parameters: 1500"), 1)
    size = sum(parameter.numel() for parameter in strategy.trainable(module.towers, STAGES[0]))
    assert 1500 - 2 * 4 * 64 < size <= 1500


def test_growing_keeps_earlier_experts_and_trains_only_the_new_ones(experiment: Make) -> None:
    module, strategy, _ = learn(experiment("vision_floor: 0.25"), 2)
    trained = {id(parameter) for parameter in strategy.trainable(module.towers, STAGES[1])}
    for path, layer in module.towers.adapters.items():
        for name in layer.lora_b:
            assert (id(layer.lora_b[name]) in trained) == (name == "shapes") == (id(layer.lora_a[name]) in trained)
            assert path in module.structure.plan(name).ranks  # type: ignore[union-attr]


def test_modules_that_no_gradient_reaches_get_no_expert(experiment: Make) -> None:
    module, strategy, _ = new_module(experiment("budget: 0.8"))
    candidates = strategy.candidates(module.towers)
    strategy.scores = dict.fromkeys(candidates["vision"], 0.0) | dict.fromkeys(candidates["language"], 1.0)
    strategy.ratios = {"vision": 0.5, "language": 0.5}
    plan = strategy.plan(STAGES[0], module.towers)
    assert set(plan.ranks) == set(candidates["language"])
    strategy.scores = dict.fromkeys(strategy.scores, 0.0)
    with pytest.raises(ValueError, match="no gradient reaches"):
        strategy.plan(STAGES[0], module.towers)


# ------------------------------------------------------------------------------------------------------------------ probe


def test_a_score_is_the_norm_of_the_mean_gradient_of_the_pretrained_model(experiment: Make) -> None:
    """Against plain autograd, sample by sample; the adapters that are there already make no difference."""
    module, strategy, stream = learn(experiment("vision_floor: 0.5"), 1)
    paths = [path for paths in strategy.candidates(module.towers).values() for path in paths]
    batches = list(stream.probe_loader(6))
    scores = gradient_scores(module.towers, paths, batches, 6)
    plain = load_backbone(module.config.backbone).model.eval()
    collator, dataset = stream.train_collator, stream.probe_loader(6).dataset
    weights = {path: plain.get_submodule(path).weight.requires_grad_(True) for path in paths}
    for index in range(6):
        (answer_loss(plain, collator([dataset[index]])).loss / 6).backward()
    for path, weight in weights.items():
        expected = (
            0.0 if weight.grad is None else weight.grad.norm().item()
        )  # LLaVA does not read the tower's last layer
        assert scores[path] == pytest.approx(expected, rel=1e-4)
    assert 0 < sum(score > 0 for score in scores.values()) < len(scores)
    assert not any(parameter.requires_grad for parameter in module.model.get_submodule(paths[0] + ".base").parameters())
    assert all(module.model.get_submodule(path).weight.grad is None for path in paths)


def test_scores_do_not_depend_on_batches_and_may_be_kept_on_the_host(experiment: Make) -> None:
    module, strategy, stream = new_module(experiment())
    paths = strategy.candidates(module.towers)["language"]
    whole = gradient_scores(module.towers, paths, stream.probe_loader(8), 8)
    collator, dataset = stream.train_collator, stream.probe_loader(8).dataset
    single = gradient_scores(module.towers, paths, (collator([dataset[i]]) for i in range(8)), 8, offload=True)
    assert whole == pytest.approx(single, rel=1e-4)


def test_a_smaller_probe_sample_is_the_beginning_of_a_larger_one(experiment: Make) -> None:
    _, _, stream = new_module(experiment())
    small, large = ([stream.probe_loader(n).dataset[i].row for i in range(n)] for n in (5, 12))
    assert large[:5] == small and len(set(large)) == 12


def test_the_loss_of_a_sample_is_its_own(experiment: Make) -> None:
    module, _, stream = new_module(experiment())
    samples = [stream.split("colours", "train")[index] for index in range(3)]
    with torch.no_grad():
        together = sample_losses(module.model, stream.train_collator(samples))
        alone = [answer_loss(module.model, stream.train_collator([sample])).loss for sample in samples]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------------- routing


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
    from mcit_lightning.data.collate import EvalCollator

    asked = EvalCollator(module.processor, stream.config.prompt)
    from dataclasses import replace

    evaluated = sequence_features(module.towers, asked([replace(sample, turns=sample.turns[:1])]))
    torch.testing.assert_close(trained, evaluated, rtol=1e-4, atol=1e-5)


def test_a_sample_without_an_image_is_judged_by_its_text(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 2)
    from dataclasses import replace

    from mcit_lightning.data.collate import EvalCollator

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


# ---------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("budget: 0.0", r"budget: is 0.0, must be in \(0, 1\]"),
        ("quantile: 1.5", "quantile: is 1.5"),
        ("margin: 0.0", "margin: is 0.0, must be greater than 0"),
        ("vision_floor: 2.0", "vision_floor: is 2.0"),
        ("router_held_out: 1.0", "router_held_out"),
        ("router_minimum: 1", "router_minimum: is 1, must be at least 2"),
        ("router: softmax", "router"),
        ("targets: {audio: [q_proj]}", "unknown tower audio"),
        ("allocation: uniform, budget_parameters: 100", "budget_parameters: uniform allocation"),
        ("router: oracle, route_scope: batch_vote", "route_scope: the oracle"),
    ],
)
def test_wrong_values_are_refused(option: str, message: str, experiment: Make) -> None:
    with pytest.raises(ValueError, match=message):
        experiment(option)


def test_missing_targets_are_refused_before_anything_runs(experiment: Make) -> None:
    module, strategy, _ = new_module(experiment("targets: {language: [query]}"))
    with pytest.raises(ValueError, match="'query' matches no linear"):
        strategy.check(module.towers, STAGES)
