"""D-MoLE on a tiny model: what the probe measures and what is allocated by it."""

from pathlib import Path

import pytest
import torch
from dmole_model import STAGES, Make, experiments_in, learn, new_module

from mcit_lightning.backbone import load_backbone
from mcit_lightning.loss import answer_loss, sample_losses
from mcit_lightning.probe import gradient_scores


@pytest.fixture
def experiment(smoke_root: Path) -> Make:
    return experiments_in(smoke_root)


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
        ("allocation: uniform, budget_parameters: 100", "budget_parameters: is 100, which has no effect: uniform"),
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
