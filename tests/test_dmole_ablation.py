"""Every row of `benchmarks/dmole_ablation.yaml` is what its name says: its strategy on the tiny model, against the full one."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from dmole_model import STAGES, TASKS, evaluation_batches, logits, merge, new_module, routed_logits, rows

from mcit_lightning.allocation import shares
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.strategies import DMoLE
from mcit_lightning.validation import build_strategy

PLAN = yaml.safe_load((Path(__file__).parent.parent / "benchmarks/dmole_ablation.yaml").read_text())
ROWS = list(PLAN["runs"])
LINEARS = {"vision": 12, "language": 14}
"""Of the tiny model's towers."""


def row_config(name: str) -> ExperimentConfig:
    entry = PLAN["runs"][name]
    path = experiments_dir() / f"{entry['experiment']}.yaml"
    return load_config(path, [*PLAN["common"], *entry.get("overrides", [])])


class Found(NamedTuple):
    """What a row does on the tiny model, after three tasks whose vision gradients are a tenth of the language model's."""

    strategy: DMoLE
    plans: list[set[str]]
    ranks: set[int]
    counts: list[dict[str, int]]
    ratios: dict[str, float]
    helpers: set[float]
    """Experts per training sample of the last task."""
    routes: list[list[str]]
    """Of two samples of each task, evaluated in one batch."""
    changed: bool
    """Whether their logits differ from the pretrained model's."""


@pytest.fixture(scope="module")
def found(smoke_root: Path) -> Any:
    """`found(row)`, made once."""
    cache: dict[str, Found] = {}

    def get(name: str) -> Found:
        if name not in cache:
            cache[name] = start(name, smoke_root)
        return cache[name]

    return get


def start(name: str, smoke_root: Path) -> Found:
    row = row_config(name)
    smoke = load_config(experiments_dir() / "dmole_smoke.yaml", [f"data.root={smoke_root}", "prepare=null"])
    smoke.strategy = row.strategy
    smoke.strategy.pop("budget_parameters", None)  # a number for another model
    module, strategy, stream = new_module(smoke)
    plans = []
    for stage in STAGES:
        stream.stage = stage.index
        strategy.scores, strategy.ratios = None, None
        if strategy.needs_scores:
            generator, candidates = torch.Generator().manual_seed(stage.index), strategy.candidates(module.towers)
            strategy.scores = {
                path: (0.1 if tower == "vision" else 1.0) * (0.5 + float(torch.rand(1, generator=generator)))
                for tower, paths in candidates.items()
                for path in paths
            }
            if strategy.config.splits_by_difficulty:
                strategy.ratios = shares(strategy.difficulties(module.towers))
        plans.append(strategy.plan(stage, module.towers))
        module.grow(plans[-1])
        if strategy.needs_router:
            parts = [strategy.features(module.towers, batch) for batch in stream.probe_loader(24)]
            strategy.fit_router(stage, torch.cat(parts))
    torch.manual_seed(0)
    for layer in module.towers.adapters.values():
        for parameter in layer.lora_b.values():
            torch.nn.init.normal_(parameter, std=0.2)
    with strategy.routing(module.towers, next(iter(stream.train_dataloader())), "counts"):
        assert strategy._active is not None
        helpers = set(strategy._active.sum(1).tolist())
    pad = module.processor.tokenizer.pad_token_id
    batch = merge([rows(part, [0, 1]) for part in evaluation_batches(stream)], pad)
    answer = routed_logits(module, batch)
    routes = strategy.routed_to()
    with module.towers.pretrained():
        changed = not torch.allclose(answer, logits(module, batch))
    assert routes is not None
    return Found(
        strategy,
        [set(plan.ranks) for plan in plans],
        {rank for plan in plans for rank in plan.ranks.values()},
        [plan.extra["budget"] for plan in plans],
        plans[0].ratios,
        helpers,
        routes,
        changed,
    )


def test_the_issues_ablations_are_all_there() -> None:
    needed = {"language_only", "vision_only", "no_curriculum", "no_allocator_no_routing", "oracle", "nearest_centroid"}
    assert needed | {"uniform", "random", "co_expert_none", "co_expert_best", "released_code"} <= set(ROWS)
    assert not row_config("dmole").strategy.get("budget_parameters")


@pytest.mark.parametrize("name", [name for name in ROWS if name not in ("dmole", "no_allocator_no_routing")])
def test_a_row_differs_from_the_full_method_in_what_it_names(name: str) -> None:
    """So that no override is lost on the way: the strategies that are built differ, and in nothing else."""
    full, row = (build_strategy(row_config(n).strategy).config for n in ("dmole", name))
    different = {key for key in vars(full) if getattr(full, key) != getattr(row, key)}
    entry = PLAN["runs"][name]
    named = {text.partition("=")[0].removeprefix("strategy.") for text in entry.get("overrides", [])}
    if name == "released_code":
        named = set(yaml.safe_load((experiments_dir() / "_base/dmole_released.yaml").read_text())["strategy"])
        named -= {"co_expert"}  # dmole_quickstart has it already
    assert different == named


@pytest.mark.parametrize("name", [name for name in ROWS if name != "no_allocator_no_routing"])
def test_every_row_routes_and_its_experts_answer(name: str, found: Any) -> None:
    own = found(name)
    assert len(own.routes) == 6 and any(own.routes) and own.changed
    assert all(len(route) <= 2 for route in own.routes)


def test_one_tower_alone(found: Any) -> None:
    assert found("language_only").counts == [{"language": LINEARS["language"] // 2}] * 3
    assert found("vision_only").counts == [{"vision": LINEARS["vision"] // 2}] * 3
    assert all("vision" in path for plan in found("vision_only").plans for path in plan)
    assert not any("vision" in path for plan in found("language_only").plans for path in plan)


def test_the_curriculum_follows_the_gradients_and_its_absence_the_candidates(found: Any) -> None:
    full, without = found("dmole"), found("no_curriculum")
    assert full.ratios["vision"] < 0.15 and all(count["vision"] <= 2 for count in full.counts)
    assert without.ratios == {"vision": 12 / 26, "language": 14 / 26}
    assert without.counts == [{"vision": 6, "language": 7}] * 3
    assert all(count["vision"] == 3 for count in found("vision_floor").counts)  # a quarter of 13, rounded down


def test_random_and_uniform_allocation_keep_budget_and_routing(found: Any) -> None:
    full, random, uniform = found("dmole"), found("random"), found("uniform")
    assert random.counts == full.counts and random.plans != full.plans and random.ranks == full.ranks == {36}
    assert uniform.counts == [LINEARS] * 3 and uniform.ranks == {18}
    assert random.routes == uniform.routes == full.routes


def test_layers_are_whole(found: Any) -> None:
    for plan in found("layers").plans:
        layers = {path.partition(".layers.")[0] + path.partition(".layers.")[2][:2] for path in plan}
        assert len(plan) == sum(6 if "vision" in layer else 7 for layer in layers)


def test_routers(found: Any) -> None:
    truth = [task for task in TASKS for _ in range(2)]
    assert [route[0] for route in found("oracle").routes] == truth
    full, centroid = found("dmole").strategy.bank, found("nearest_centroid").strategy.bank
    assert full.w1.shape[1] == 128 and centroid.w1.shape[1] == 0
    assert len({tuple(route) for route in found("batch_vote").routes}) == 1
    assert len({tuple(route) for route in found("released_code").routes}) == 1
    assert len({tuple(route) for route in found("dmole").routes}) > 1
    assert all(len(route) == 2 for route in found("co_expert_best_no_threshold").routes)


def test_co_experts(found: Any) -> None:
    assert found("co_expert_none").helpers == {1.0}
    assert found("co_expert_best").helpers == {2.0} == found("co_expert_best_no_threshold").helpers
    assert found("dmole").strategy.config.co_expert == "thresholded"


def test_without_allocator_there_is_no_routing_either() -> None:
    config, full = row_config("no_allocator_no_routing"), row_config("dmole")
    strategy = build_strategy(config.strategy)
    assert config.strategy["name"] == "sequential" and strategy.routed_to() is None
    assert strategy.config.rank * 2 == full.strategy["rank"] and strategy.config.targets == full.strategy["targets"]
    assert strategy.config.alpha / strategy.config.rank == full.strategy["alpha"] / full.strategy["rank"]
    assert config.backbone.train_projector is full.backbone.train_projector is False
    left_out = {"name", "strategy", "callbacks", "out"}
    assert {k: v for k, v in vars(config).items() if k not in left_out} == {
        k: v for k, v in vars(full).items() if k not in left_out
    }
