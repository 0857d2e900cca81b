"""BranchLoRA's options: what each changes, and which combinations are refused."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_branchlora import BRANCH, STAGES, TASKS, batches, build, last_logits, merge, rows
from torch import Tensor

from callbacks import BranchFreeze
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.evaluation.predictions import read_predictions
from mcit_lightning.generation import generate_answers
from mcit_lightning.key_encoders import TowerEncoder
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.plans import FreezeRecord
from mcit_lightning.runner import run
from mcit_lightning.strategies import BranchLoRA
from mcit_lightning.validation import build_strategy


@pytest.fixture
def experiment(smoke_root: Path) -> Callable[..., ExperimentConfig]:
    def make(*overrides: str) -> ExperimentConfig:
        return load_config(
            experiments_dir() / "branchlora_smoke.yaml", [f"data.root={smoke_root}", "prepare=null", *overrides]
        )

    return make


Make = Callable[..., ExperimentConfig]


def short(*more: str) -> list[str]:
    """Overrides for a run of two tasks in a second."""
    return [
        "order=[colours,counts]",
        "data.limit_train=12",
        "data.limit_val=4",
        "data.limit_test=4",
        "zero_shot=false",
        "trainer.accelerator=cpu",
        "trainer.enable_progress_bar=false",
        *more,
    ]


def final(folder: Path, stage: int) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(folder / f"stage_{stage:02d}/final.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 1}, "top_k: with 1.*renormalize_top_k: false"),
        ({"router_init": "zeros", "router_noise": 0.0}, "router_init: with 'zeros'"),
        ({"router_init": "previous", "task_routers": False}, "router_init: 'previous' needs task_routers"),
        ({"router_init": "ones"}, "router_init"),
        ({"freeze_count": 0}, "freeze_count: is 0, must be between 1 and experts"),
        ({"freeze_count": 9}, "freeze_count: is 9"),
        ({"freeze_by": "weight"}, "freeze_by"),
        ({"freeze_trunk_after": -1}, "freeze_trunk_after: is -1"),
        ({"alignment_weight": -1.0}, "alignment_weight: is -1"),
        ({"min_similarity": 1.5}, "min_similarity: is 1.5, must be a cosine"),
        (
            {"min_similarity": 0.5, "selector": "oracle"},
            "min_similarity: is 0.5, but there are no keys with selector: oracle",
        ),
        (
            {"key_encoder": "x", "task_routers": False},
            "key_encoder: is 'x', but there are no keys with task_routers: false",
        ),
        ({"selector": "learned_keys", "task_routers": False}, "selector: 'learned_keys' needs task_routers"),
    ],
)
def test_contradictions_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_strategy({"name": "branchlora", **change})


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 1, "renormalize_top_k": False},
        {"router_init": "zeros"},
        {"freeze_trunk_after": 0},
        {"min_similarity": -0.2},
        {"freeze_count": 8, "freeze_by": "mass"},
    ],
)
def test_what_is_allowed(change: dict[str, Any]) -> None:
    assert isinstance(build_strategy({"name": "branchlora", **change}), BranchLoRA)


@pytest.mark.parametrize("init", ["kaiming", "zeros", "previous"])
def test_a_tasks_router_starts_as_configured(init: str, experiment: Make) -> None:
    module = build(experiment(BRANCH, f"strategy.router_init={init}"), STAGES[:1])
    for layer in module.towers.adapters.values():
        assert layer.routers["colours"].any() == (init != "zeros")
        torch.nn.init.normal_(layer.routers["colours"])
    trained = [layer.routers["colours"].clone() for layer in module.towers.adapters.values()]
    module.grow(module.strategy.plan(STAGES[1], module.towers))
    # a plan that is carried out again (a run that resumes) leaves trained routers alone
    module.strategy.grow(module.towers, module.strategy.plan(STAGES[1], module.towers))
    for layer, old in zip(module.towers.adapters.values(), trained, strict=True):
        new = layer.routers["shapes"]
        assert torch.equal(layer.routers["colours"], old) and new is not layer.routers["colours"]
        assert torch.equal(new, old) == (init == "previous") and new.any() == (init != "zeros")


def test_zero_routers_with_noise_reach_every_branch(experiment: Make, tmp_path: Path) -> None:
    run(experiment(BRANCH, f"out={tmp_path / 'run'}", *short("strategy.router_init=zeros")))
    state = final(tmp_path / "run", 1)
    assert all(value.any() for name, value in state.items() if ".lora_b." in name or ".routers." in name)


def test_what_freezes_by_mass(experiment: Make) -> None:
    """Branch 0 was chosen most often, branches 3 and 1 had the largest gates."""
    module = build(experiment(BRANCH, "strategy.freeze_by=mass"), STAGES[:1])
    strategy: Any = module.strategy
    path, layer = next(iter(module.towers.adapters.items()))
    count, mass = torch.tensor([[9.0, 5, 2, 5]]), torch.tensor([[1.0, 3, 2, 4]])
    assert strategy.most_used({path: layer}, count, mass) == {path: ["expert3", "expert1"]}
    assert strategy.most_used({path: layer}, count, torch.tensor([[3.0, 3, 2, 4]])) == {path: ["expert3", "expert0"]}
    strategy.config.freeze_by = "count"
    assert strategy.most_used({path: layer}, count, mass) == {path: ["expert0", "expert3"]}


def test_usage_rows_are_in_the_order_of_the_layers(experiment: Make) -> None:
    """Not of the calls: some models call their linears in another order than they list them in."""
    module = build(experiment(BRANCH, "strategy.gate_input=mean"), STAGES[:1]).train()
    strategy: Any = module.strategy
    batch = next(iter(ContinualDataModule(module.config, module.processor, STAGES).train_dataloader()))
    with torch.no_grad(), strategy.routing(module.towers, batch, "colours"):
        module.model(**batch["inputs"])
    layers = module.towers.adapters
    usage = strategy.usage(layers)
    strategy.state.used = dict(reversed(strategy.state.used.items()))
    assert torch.equal(strategy.usage(layers), usage) and len({str(row.tolist()) for row in usage}) > 5
    strategy.state.used.pop(list(layers)[3])
    assert usage[3].any() and not strategy.usage(layers)[3].any()


def test_a_branch_with_its_own_a_freezes_as_a_whole(experiment: Make) -> None:
    module = build(experiment(BRANCH, "strategy.shared_trunk=false"), STAGES[:1])
    strategy = module.strategy
    path, layer = next(iter(module.towers.adapters.items()))
    strategy.freeze(module.towers, FreezeRecord("colours", {path: ["expert1"]}))
    trained = {id(parameter) for parameter in strategy.trainable(module.towers, STAGES[0])}
    assert [name for name, a in layer.lora_a.items() if id(a) in trained] == ["expert0", "expert2", "expert3"]
    shared = build(experiment(BRANCH), STAGES[:1])
    path, layer = next(iter(shared.towers.adapters.items()))
    shared.strategy.freeze(shared.towers, FreezeRecord("colours", {path: [f"expert{index}" for index in range(4)]}))
    assert id(layer.lora_a["trunk"]) in {
        id(parameter) for parameter in shared.strategy.trainable(shared.towers, STAGES[0])
    }


def test_a_module_without_a_branch_left_is_warned_of(
    experiment: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        run(experiment(BRANCH, f"out={tmp_path / 'run'}", *short("strategy.freeze_count=4", "strategy.router_noise=9")))
    warnings = [record.getMessage() for record in caplog.records if record.name == BranchFreeze.__module__]
    assert [text.split(":")[0] for text in warnings] == [
        f"after stage {task} all branches of 14 of 14 modules are frozen" for task in ("colours", "counts")
    ]


def test_unknown_samples_get_the_pretrained_model(experiment: Make) -> None:
    """A threshold between two samples' similarities: one is routed, the other one gets what no adapter would give."""
    config = experiment(BRANCH, "strategy.min_similarity=0.0")
    module = build(config, STAGES, std=0.3)
    strategy: Any = module.strategy
    pad = module.processor.tokenizer.pad_token_id
    batch = merge([rows(part, [0, 1]) for part in batches(config, module)], pad)
    found = strategy.key_encoder().embed(module.towers, batch)
    for row, task in enumerate(TASKS):
        strategy.selector.update(task, *(value[[2 * row]] for value in found))
    similarity = strategy.selector.scores(*found).max(1).values / 2
    smallest = float(similarity.sort().values[2:4].mean())
    strategy.config.min_similarity = smallest
    logits = last_logits(module, batch)
    routes = strategy.routed_to()
    assert [bool(route) for route in routes] == (similarity >= smallest).tolist() and routes.count([]) == 3
    with module.towers.pretrained():
        base = last_logits(module, batch)
    for row, route in enumerate(routes):
        assert torch.equal(logits[row], base[row]) == (not route), row
    for row in (0, 3, 5):  # whatever else is in the batch
        torch.testing.assert_close(last_logits(module, rows(batch, [row])), logits[[row]], rtol=1e-4, atol=1e-5)
        assert strategy.routed_to() == [routes[row]]


def test_keys_are_the_sums_over_the_training_rows(experiment: Make, tmp_path: Path) -> None:
    """Two micro-batches a step, the last one short: every row counts once."""
    config = experiment(
        BRANCH, f"out={tmp_path / 'run'}", *short("trainer.accumulate_grad_batches=2", "data.limit_train=10")
    )
    run(config)
    module = build(config, [])
    stream = ContinualDataModule(config, module.processor, STAGES)
    image = text = torch.zeros(32)
    for batch in stream.probe_loader(10):
        found = TowerEncoder().embed(module.towers, batch)
        image = image + F.normalize(found.image, dim=-1).sum(0)
        text = text + F.normalize(found.text, dim=-1).sum(0)
    for stage in (1, 2):  # later tasks leave them alone
        state = final(tmp_path / "run", stage)
        torch.testing.assert_close(state["strategy.selector.image_keys.colours"], image, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(state["strategy.selector.text_keys.colours"], text, rtol=1e-4, atol=1e-4)


def test_learned_keys_turn_to_their_task(experiment: Make, tmp_path: Path) -> None:
    """The alignment loss of a validation batch is of its own rows, and needs no training batch before it."""
    learned = ("strategy.selector=learned_keys", "optim.strategy_lr=0.05")
    config = experiment(BRANCH, f"out={tmp_path / 'run'}", *short(*learned, "tasks.colours.epochs=5"))
    module = build(config, STAGES[:1])
    strategy: Any = module.strategy
    losses: dict[str, Tensor] = {}
    stream = ContinualDataModule(config, module.processor, STAGES)
    batch = next(iter(stream.val_dataloader()[0]))
    strategy.eval()
    with torch.no_grad(), strategy.routing(module.towers, batch, "colours"):
        parts = strategy.loss(module.model, batch, STAGES[0]).parts
    found = TowerEncoder().embed(module.towers, batch)
    for table, value in (("image_keys", found.image), ("text_keys", found.text)):
        losses[table] = (1 - F.cosine_similarity(value, getattr(strategy.selector, table)["colours"], dim=-1)).mean()
    torch.testing.assert_close(parts["alignment"], sum(losses.values()))
    run(config)
    state = final(tmp_path / "run", 1)
    for table, value in (("image_keys", found.image), ("text_keys", found.text)):
        after = (1 - F.cosine_similarity(value, state[f"strategy.selector.{table}.colours"], dim=-1)).mean()
        assert after < 0.4 * losses[table], table


def test_merging_needs_a_prompt_that_starts_with_text(experiment: Make) -> None:
    module = build(experiment(BRANCH), STAGES)
    strategy: Any = module.strategy
    batch = batches(module.config, module)[0]
    image = module.model.config.image_token_id
    first = (batch["inputs"]["input_ids"] == image).int().argmax(1)
    batch["inputs"]["attention_mask"] = (
        torch.arange(batch["inputs"]["input_ids"].shape[1]) >= first.unsqueeze(1)
    ).long()
    with pytest.raises(ValueError, match="start with an image"):  # noqa: SIM117
        with strategy.merged(module.towers, batch, "shapes"):
            pass


def test_a_refused_merge_leaves_the_outer_one_alone(experiment: Make) -> None:
    module = build(experiment(BRANCH, "strategy.renormalize_top_k=false", "strategy.top_k=1"), STAGES, std=0.3)
    strategy: Any = module.strategy
    batch = batches(module.config, module)[1]
    strategy.config.selector = "oracle"
    expected = last_logits(module, batch)
    before = {path: layer.base.weight for path, layer in module.towers.adapters.items()}
    with strategy.merged(module.towers, batch, "shapes"):
        merged = {path: layer.base.weight for path, layer in module.towers.adapters.items()}
        with pytest.raises(ValueError, match="merged already"):  # noqa: SIM117
            with strategy.merged(module.towers, batch, "colours"):
                pass
        assert all(layer.base.weight is merged[path] for path, layer in module.towers.adapters.items())
    assert all(layer.base.weight is before[path] for path, layer in module.towers.adapters.items())
    assert torch.equal(last_logits(module, batch), expected)


@pytest.mark.parametrize("gate", ["token", "first"])
def test_noise_reaches_every_kind_of_gate_and_evaluation_has_none(gate: str, experiment: Make) -> None:
    module = build(experiment(BRANCH, f"strategy.gate_input={gate}", "strategy.selector=oracle"), STAGES[:1], std=0.3)
    batch = next(iter(ContinualDataModule(module.config, module.processor, STAGES).train_dataloader()))

    def loss() -> Tensor:
        with torch.no_grad(), module.strategy.routing(module.towers, batch, "colours"):
            return module.strategy.loss(module.model, batch, STAGES[0]).loss

    quiet = loss()
    assert torch.equal(quiet, loss())
    module.strategy.train()  # type: ignore[no-untyped-call]
    assert len({float(loss()) for _ in range(4)} | {float(quiet)}) == 5


def test_moelora_may_adapt_the_vision_tower_too(experiment: Make, tmp_path: Path) -> None:
    both = "strategy={name: moelora, rank: 8, experts: 4, targets: {vision: [all-linear], language: [all-linear]}}"
    callbacks = "callbacks=[{_target_: callbacks.BackwardTransfer}, {_target_: callbacks.StageCheckpoint}]"
    run(experiment(both, f"out={tmp_path / 'run'}", *short(callbacks)))
    state = final(tmp_path / "run", 1)
    moved = {name.split(".")[2] for name, value in state.items() if ".lora_b." in name and value.any()}
    assert moved == {"vision_tower", "language_model"}


def test_a_loaded_checkpoint_answers_and_routes_as_the_run_did(experiment: Make, tmp_path: Path) -> None:
    """With a threshold that some samples miss: routers, keys and frozen branches come from the file alone."""
    config = experiment(
        BRANCH, f"out={tmp_path / 'run'}", *short("strategy.gate_input=mean", "strategy.min_similarity=0.98")
    )
    run(config)
    checkpoint = torch.load(tmp_path / "run/stage_02/final.ckpt", weights_only=True)
    module = build(config, [])
    module.load_weights(checkpoint)
    strategy: Any = module.eval().strategy
    assert [entry["kind"] for entry in checkpoint["mcit"]["structure"]] == ["TaskPlan", "FreezeRecord"] * 2
    assert len(strategy.frozen) == 14 and all(len(names) >= 2 for names in strategy.frozen.values())
    stream = ContinualDataModule(config, module.processor, STAGES)
    stream.evaluate_only(["colours", "counts"])
    routes = []
    for task, loader in zip(("colours", "counts"), stream.test_dataloader(), strict=True):
        saved = read_predictions(tmp_path / "run", "stage_02", task)
        for batch in loader:
            with strategy.routing(module.towers, batch, None):
                texts = generate_answers(
                    module.model, module.processor, batch["inputs"], 4, stream.train_collator.encoder.end_id
                )
            for index, text, route in zip(batch["index"], texts, strategy.routed_to(), strict=True):
                assert (saved[index]["text"], saved[index]["routed_to"]) == (text, route)
                routes.append(route)
    assert len(routes) == 8 and 0 < routes.count([]) < 8
