"""BranchLoRA's options of size and growth: ranks, scale, new branches, the end of the trunk, the vote of a batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_branchlora import BRANCH, STAGES, TASKS, batches, build, last_logits, merge, rows
from test_branchlora_options import final, short

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.plans import FreezeRecord
from mcit_lightning.runner import run
from mcit_lightning.strategies import BranchLoRA
from mcit_lightning.validation import build_strategy

Make = Callable[..., ExperimentConfig]


@pytest.fixture
def experiment(smoke_root: Path) -> Make:
    def make(*overrides: str) -> ExperimentConfig:
        return load_config(
            experiments_dir() / "branchlora_smoke.yaml", [f"data.root={smoke_root}", "prepare=null", *overrides]
        )

    return make


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"branch_rank": 0}, "branch_rank: is 0"),
        ({"rank": 9}, "experts: 8 must divide rank"),
        ({"renormalize_top_k": False, "top_k": None, "freeze_count": 2}, "renormalize_top_k: false has no effect"),
        ({"renormalize_top_k": False, "top_k": 8}, "renormalize_top_k: false has no effect"),
        ({"freeze_branches": False, "freeze_count": 2}, "freeze_count: is 2, but freeze_branches is false"),
        ({"freeze_branches": False, "freeze_by": "mass"}, "freeze_by: is 'mass', but freeze_branches is false"),
        ({"freeze_branches": False, "freeze_only_tunable": True}, "freeze_only_tunable: is True, but"),
        ({"freeze_branches": False, "grow_exhausted": 1}, "grow_exhausted: is 1, but"),
        ({"grow_exhausted": -1}, "grow_exhausted: is -1"),
        ({"grow_exhausted": 1, "task_routers": False}, "grow_exhausted: needs task_routers"),
        ({"alignment_weight": 0.5}, "alignment_weight: is 0.5, but only selector: learned_keys"),
        ({"alignment_weight": 0.0, "selector": "learned_keys"}, "alignment_weight: with 0 the learned keys never move"),
        ({"selector": "oracle", "task_routers": False}, "selector: 'oracle' needs task_routers"),
        ({"route_scope": "batch_vote", "selector": "oracle"}, "route_scope: is 'batch_vote', but there are no keys"),
        ({"route_scope": "batch_vote", "min_similarity": 0.1}, "route_scope: 'batch_vote' has no place"),
    ],
)
def test_options_without_effect_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_strategy({"name": "branchlora", **change})


def test_zero_routers_are_fine_where_all_branches_are_mixed() -> None:
    build_strategy(
        {"name": "branchlora", "top_k": None, "freeze_count": 2, "router_init": "zeros", "router_noise": 0.0}
    )


@pytest.mark.parametrize(
    ("options", "rank", "scale"),
    [
        ("", 2, 2.0),
        ("strategy.branch_rank=3", 3, 2.0),
        ("strategy.scale_by=branch_rank", 2, 8.0),
        ("strategy={name: branchlora, rank: 7, alpha: 14, experts: 4, branch_rank: 7, scale_by: branch_rank}", 7, 2.0),
    ],
)
def test_ranks_and_scale(options: str, rank: int, scale: float, experiment: Make) -> None:
    module = build(experiment(BRANCH, *filter(None, [options])), STAGES[:1])
    for layer in module.towers.adapters.values():
        assert {tuple(b.shape) for b in layer.lora_b.values()} == {(layer.out_features, rank)}
        assert layer.lora_a["trunk"].shape == (rank, layer.in_features) and layer.scale == scale
    plan = module.structure.plan("colours")
    assert plan is not None and set(plan.ranks.values()) == {4 * rank}


def grown(experiment: Make, *options: str) -> Any:
    """Two tasks; all branches of the first module froze after the first one."""
    module = build(experiment(BRANCH, "strategy.grow_exhausted=2", *options), STAGES[:1])
    path = next(iter(module.towers.adapters))
    module.freeze_branches(FreezeRecord("colours", {path: [f"expert{index}" for index in range(4)]}))
    module.grow(module.strategy.plan(STAGES[1], module.towers))
    torch.manual_seed(1)
    for name in ("expert4", "expert5"):
        torch.nn.init.normal_(module.towers.adapters[path].lora_b[name])
    return module, path


def test_an_exhausted_module_gets_new_branches(experiment: Make) -> None:
    module, path = grown(experiment)
    strategy: BranchLoRA = module.strategy
    layers = module.towers.adapters
    assert [len(layer.lora_b) for layer in layers.values()] == [6] + [4] * 13
    assert [len(router) for router in layers[path].routers.values()] == [4, 6]
    trained = {id(parameter) for parameter in strategy.trainable(module.towers, STAGES[1])}
    assert [name for name, b in layers[path].lora_b.items() if id(b) in trained] == ["expert4", "expert5"]
    before = module.structure.to_list()
    strategy.grow(module.towers, module.structure.plan("shapes"))  # type: ignore[arg-type]  # carried out again
    assert len(layers[path].lora_b) == 6 and strategy.plan(STAGES[2], module.towers).extra["more"] == {}
    again = build(experiment(BRANCH, "strategy.grow_exhausted=2"), [])
    again.replay(before)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}


@pytest.mark.parametrize("options", [[], ["strategy.top_k=null", "strategy.freeze_count=2"]])
@pytest.mark.parametrize("gate", ["first", "token"])
def test_earlier_tasks_never_see_a_new_branch(gate: str, options: list[str], experiment: Make) -> None:
    """In a batch of both tasks: the earlier one's answers are those without the new branches, the later one's are not."""
    module, path = grown(experiment, "strategy.selector=oracle", f"strategy.gate_input={gate}", *options)
    layer = module.towers.adapters[path]
    parts = batches(module.config, module)[:2]
    batch = merge([rows(part, [0, 1]) for part in parts], module.processor.tokenizer.pad_token_id)
    expected = last_logits(module, batch)
    torch.testing.assert_close(last_logits(module, rows(batch, [0])), expected[[0]], rtol=1e-4, atol=1e-5)
    for name in ("expert4", "expert5"):
        torch.nn.init.normal_(layer.lora_b[name], std=3.0)
    torch.nn.init.normal_(layer.routers["shapes"][4:].detach(), std=9.0)
    changed = last_logits(module, batch)
    assert torch.equal(changed[:2], expected[:2]) and not torch.allclose(changed[2:], expected[2:])


def test_a_run_in_which_every_module_grows(experiment: Make, tmp_path: Path) -> None:
    options = ("strategy.freeze_count=4", "strategy.router_noise=9", "strategy.grow_exhausted=2")
    run(experiment(BRANCH, f"out={tmp_path / 'run'}", *short(*options)))
    first, second = (final(tmp_path / "run", stage) for stage in (1, 2))
    new = {name for name in second if ".lora_b." in name} - set(first)
    assert len(new) == 2 * 14 and sum(bool(second[name].any()) for name in new) > 14  # a few were never chosen
    old = [name for name in first if ".lora_b." in name]
    assert len(old) == 4 * 14 and all(torch.equal(first[name], second[name]) for name in old)


@pytest.mark.parametrize(("after", "moves"), [(0, [False, False]), (1, [True, False]), (2, [True, True])])
def test_the_trunk_freezes_after_that_many_tasks(
    after: int, moves: list[bool], experiment: Make, tmp_path: Path
) -> None:
    config = experiment(BRANCH, f"out={tmp_path / 'run'}", *short(f"strategy.freeze_trunk_after={after}"))
    run(config)
    start = {f"model.{path}.lora_a.trunk": layer.lora_a["trunk"] for path, layer in
             build(config, STAGES[:1]).towers.adapters.items()}  # fmt: skip
    states = [start, final(tmp_path / "run", 1), final(tmp_path / "run", 2)]
    for before, after_, moved in zip(states, states[1:], moves, strict=False):
        assert {not torch.equal(before[name], after_[name]) for name in start} == {moved}


def test_a_batch_votes_for_one_task(experiment: Make) -> None:
    module = build(experiment(BRANCH, "strategy.route_scope=batch_vote"), STAGES, std=0.3)
    strategy: Any = module.strategy
    parts = batches(module.config, module)
    for task, part in zip(TASKS, parts, strict=True):
        strategy.selector.update(task, *strategy.key_encoder().embed(module.towers, part))
    pad = module.processor.tokenizer.pad_token_id
    mixed = merge([rows(parts[0], [0]), rows(parts[2], [0, 1, 2])], pad)
    strategy.config.route_scope = "sample"
    last_logits(module, mixed)
    single = [tasks[0] for tasks in strategy.routed_to()]
    strategy.config.route_scope = "batch_vote"
    last_logits(module, mixed)
    most = max(TASKS, key=lambda task: (single.count(task), -TASKS.index(task)))
    assert len(set(single)) > 1 and strategy.routed_to() == [[most]] * 4


def test_merging_is_refused_in_training_mode(experiment: Make) -> None:
    module = build(experiment(BRANCH), STAGES)
    strategy: Any = module.strategy
    batch = batches(module.config, module)[0]
    module.train()
    with pytest.raises(ValueError, match="training mode"):  # noqa: SIM117
        with strategy.merged(module.towers, batch, "shapes"):
            pass
