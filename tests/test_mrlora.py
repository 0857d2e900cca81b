"""MR-LoRA: what the router is asked and how its answer is read, that it alone is tuned, and that experts never change."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from dmole_model import evaluation_batches, logits, merge, routed_logits, rows
from stage_steps import TASKS, Make, Steps

from callbacks import RouterTuning
from mcit_lightning.config import ExperimentConfig, TaskConfig
from mcit_lightning.data.records import Sample
from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.evaluation.results import CostRow
from mcit_lightning.expert_question import TEMPLATE, ExpertQuestion
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.strategies import MRLoRAConfig
from mcit_lightning.strategies.mrlora import PRETRAINED, ROUTER
from mcit_lightning.tuning import TuningRecipe, tune
from mcit_lightning.validation import build_strategy

FAST = {"router_samples": 4, "router_epochs": 2, "router_batch_size": 3, "router_max_new_tokens": 2}
THREE = ExpertQuestion((("rs", "Sees the earth."), ("med", "Sees cells."), ("fin", "Sees prices.")))


def end(run: Steps, index: int) -> None:
    """The end of a stage as the callback makes it, with a trainer that has one process."""
    trainer: Any = SimpleNamespace(
        datamodule=run.stream,
        strategy=SimpleNamespace(batch_to_device=lambda batch: batch),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
        is_global_zero=False,
    )
    run.module.results = SimpleNamespace(cost_row=lambda *_: CostRow("", "", 0))  # type: ignore[assignment]
    RouterTuning().on_task_end(trainer, run.module, run.stages[index])
    run.module.eval()


def learn(run: Steps, stages: int) -> Steps:
    """Stages with their ends."""
    for index in range(stages):
        run.train(run.start(index))
        end(run, index)
    return run


def asked(run: Steps) -> list[dict[str, Any]]:
    """An evaluation batch of every task, with the router's question."""
    run.stream.train_collator.reader = run.strategy.sample_reader()
    return evaluation_batches(run.stream)


def state(run: Steps) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.module.state_dict().items()}


# ------------------------------------------------------------------------------------------------------------- the question


@pytest.mark.parametrize(
    ("answer", "expert"),
    [
        ("A", 0),
        (" B\n", 1),
        ("C.", 2),  # one other character is allowed
        ("CB", 1),  # of several letters the first one of the alphabet
        ("B, A", None),  # two other characters
        ("Expert B", None),
        ("D", None),  # there is no fourth expert
        ("b", None),
        (".", None),
        ("", None),
    ],
)
def test_how_an_answer_is_read(answer: str, expert: int | None) -> None:
    assert THREE.chosen(answer) == expert


def test_what_the_router_is_asked_and_what_it_is_to_answer() -> None:
    question = replace(THREE, template="{experts}\n{question} ({letters})")
    sample = Sample("7", "med", (), (("user", "Hello"), ("assistant", "Yes"), ("user", " Is it {experts}?\n")))
    text = "A: Sees the earth.\nB: Sees cells.\nC: Sees prices.\nIs it {experts}? (A, B, C)"
    assert question.about(sample) == (("user", text),)
    solved = question.solved(replace(sample, turns=(*sample.turns, ("assistant", "It is"))))
    assert solved.turns == (("user", text), ("assistant", "B"))
    assert all(part in THREE.about(sample)[0][1] for part in ("A: Sees the earth.", "Is it {experts}?", "(A, B, C)"))
    assert "{letters}" in TEMPLATE


def test_descriptions_come_from_the_configuration_or_from_the_longest_name(smoke_processor: Any) -> None:
    strategy: Any = build_strategy({"name": "mrlora", "descriptions": {"med": "Sees cells."}})
    tasks = {"rs": TaskConfig(aliases=["remote_sensing"]), "med": TaskConfig(), "stock-charts": TaskConfig()}
    strategy.use_prompts(None, tasks)
    strategy.tasks = list(tasks)
    assert [text for _, text in strategy.expert_question().experts] == [
        "An expert in remote sensing.",
        "Sees cells.",
        "An expert in stock charts.",
    ]
    with pytest.raises(ValueError, match=r"strategy\.descriptions: no task med; the experiment has rs"):
        strategy.use_prompts(None, {"rs": TaskConfig()})


def test_the_question_is_about_learnt_tasks_and_in_evaluation_batches_alone(steps: Make) -> None:
    run = steps("mrlora", **FAST)
    learn(run, 1)
    assert run.strategy.sample_reader() is None, "there is nothing to choose"
    assert "strategy_inputs" not in asked(run)[0]
    learn(run, 2)
    batch = asked(run)[1]
    own = batch["strategy_inputs"]
    texts = run.module.processor.tokenizer.batch_decode(own["input_ids"])
    for text, prompt in zip(texts, batch["prompt"], strict=True):
        assert prompt in text and "A: An expert in colours." in text and "B: An expert in shapes." in text
        assert "counts" not in text.replace(prompt, "")
    assert own["attention_mask"][:, -1].all(), "padded on the left"
    assert (
        run.strategy.sample_reader()([replace(run.stream.split("shapes", "train")[0])], [(("assistant", "x"),)]) == {}
    )


# --------------------------------------------------------------------------------------------------------- the router's training


def test_only_the_router_is_tuned_and_it_starts_anew(steps: Make) -> None:
    run = learn(steps("mrlora", **FAST), 1)
    run.train(run.start(1))
    flags = {name: parameter.requires_grad for name, parameter in run.module.named_parameters()}
    before = state(run)
    end(run, 1)
    once = state(run)
    changed = {name for name in once if not torch.equal(before[name], once[name])}
    assert changed and all(name.endswith((f"lora_a.{ROUTER}", f"lora_b.{ROUTER}")) for name in changed)
    assert len(changed) == 2 * len(run.towers.adapters)
    assert flags == {name: parameter.requires_grad for name, parameter in run.module.named_parameters()}
    end(run, 1)  # as after a kill
    assert all(torch.equal(value, once[name]) for name, value in state(run).items())
    run.strategy.new_router(run.towers)
    assert all(torch.equal(value, before[name]) for name, value in state(run).items())


def test_after_one_task_there_is_no_router_to_train_and_nothing_is_asked(steps: Make) -> None:
    run = steps("mrlora", **FAST)
    run.train(run.start(0))
    before = state(run)
    end(run, 0)
    assert all(torch.equal(value, before[name]) for name, value in state(run).items())
    for batch in asked(run):
        with run.strategy.routing(run.towers, batch, None):
            assert run.strategy.routed_to() == [["colours"]] * len(batch["id"])
    assert run.strategy.samples_examined == 0


def test_a_trained_router_finds_the_task_whatever_else_is_in_the_batch(steps: Make) -> None:
    """The tasks' questions differ, and a random model can learn to tell them apart if its activations are of some size."""
    learnt = {"router_samples": 8, "router_epochs": 25, "router_lr": 1e-2, "router_batch_size": 8}
    run = steps("mrlora", **{**FAST, **learnt, "question": "{experts} {question} "})
    torch.manual_seed(0)
    for parameter in run.module.model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    learn(run, 2)
    batches = asked(run)[:2]
    for batch in batches:
        with run.strategy.routing(run.towers, batch, None):
            assert run.strategy.routed_to() == [[task] for task in batch["task"]]
    pad = run.module.processor.tokenizer.pad_token_id
    together = merge([rows(batch, [0, 1]) for batch in batches], pad, extra=5)
    together["task"] = ["unknown"] * 4
    with run.strategy.routing(run.towers, together, None):
        assert run.strategy.routed_to() == [["colours"], ["colours"], ["shapes"], ["shapes"]]


def test_an_answer_that_names_no_expert_sends_the_sample_to_one_by_lot(steps: Make) -> None:
    run = learn(steps("mrlora", **FAST), 2)
    run.strategy.new_router(run.towers)  # a random model
    chosen = []
    for batch in asked(run)[:2]:
        ids = [f"{name} {number}" for number, name in enumerate(batch["id"])]
        for order in (ids, ids[::-1]):
            with run.strategy.routing(run.towers, {**batch, "id": order}, None):
                routed = run.strategy.routed_to()
            assert routed == [[TASKS[derive_seed(run.strategy.seed, "no expert", name) % 2]] for name in order]
            chosen += routed
    assert {task for (task,) in chosen} == {"colours", "shapes"}


def test_each_epoch_shows_every_sample_once_and_the_processes_share_a_step(steps: Make) -> None:
    recipe = TuningRecipe(epochs=2, lr=1e-3, batch_size=3, warmup_ratio=0.0, seed=5)
    plan = recipe.steps(7)
    assert [len(step) for step in plan] == [3, 3, 1] * 2
    epochs = [[position for step in part for position in step] for part in (plan[:3], plan[3:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7)) and epochs[0] != epochs[1]
    stream = steps("mrlora", **FAST).stream
    samples = stream.kept_samples("colours", 7)
    found = []
    for rank in range(2):
        stream.trainer = SimpleNamespace(global_rank=rank, world_size=2)  # type: ignore[assignment]
        found.append(list(stream.tuning_loader(samples, plan)))
    stream.trainer = None
    for step, first, second in zip(plan, *found, strict=True):
        names = [samples[position].id for position in step]
        assert first[0]["id"] == names[::2] and first[1]
        assert second == (second[0], len(step) > 1) and second[0]["id"] == (names[1::2] or names[:1])


def test_tuning_that_diverges_is_refused(steps: Make) -> None:
    run = learn(steps("mrlora", **FAST), 2)
    run.strategy.config.router_lr = 1e30
    with pytest.raises(ValueError, match=r"the router of stage 'shapes' has diverged.*lower strategy\.router_lr"):
        end(run, 1)


def test_a_sample_that_does_not_count_changes_nothing(steps: Make) -> None:
    """Two steps that count, with one between them that does not, against the gradient by hand."""
    weight = torch.nn.Parameter(torch.tensor([[1.0], [0.0]]), requires_grad=False)
    inner = torch.nn.Linear(1, 2, bias=False)
    inner.weight = weight

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = inner

        def base_model(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=x)

        def get_output_embeddings(self) -> torch.nn.Module:
            return self.head

    def batch(*targets: int) -> dict[str, Any]:
        x = torch.ones(len(targets), 1, 1)
        return {
            "inputs": {"x": x},
            "positions": torch.arange(len(targets)),
            "targets": torch.tensor(targets),
            "id": ["a"],
        }

    recipe = TuningRecipe(epochs=1, lr=0.1, batch_size=2, warmup_ratio=0.0, seed=0)
    parts = [(batch(1, 1), True)]
    contexts: dict[str, Any] = {"acting": lambda _: nullcontext(), "context": nullcontext}
    first, last = tune(Model(), [weight], parts, recipe, 1, **contexts)  # type: ignore[arg-type]
    assert first == last == pytest.approx(1.3132617)  # -log softmax([1, 0])[1]
    # Adam's first step is the sign of the gradient (p - y), which is positive for class 0
    torch.testing.assert_close(weight.data, torch.tensor([[0.9], [0.1]]))
    assert not weight.requires_grad and weight.grad is None


# ------------------------------------------------------------------------------------------------------------------ experts


@pytest.mark.parametrize("projector", ["per_task", "shared"])
def test_an_expert_answers_after_later_tasks_as_when_it_was_trained(steps: Make, projector: str) -> None:
    run = steps("mrlora", projector=projector, **FAST)
    batch = asked(run)[0]
    then = []
    for index in range(3):
        run.train(run.start(index), lr=5e-2)
        with torch.no_grad(), run.strategy.routing(run.towers, batch, TASKS[index]):
            run.module.eval()
            then.append(logits(run.module, batch))
        end(run, index)
    size = len(batch["id"])
    for choice in ([0] * size, [1] * size, [2, 0, 1, 2][:size]):
        run.strategy._ask = lambda towers, batch, choice=choice: choice
        now = routed_logits(run.module, batch)
        assert run.strategy.routed_to() == [[TASKS[expert]] for expert in choice]
        for row, expert in enumerate(choice):
            same = torch.allclose(now[row], then[expert][row], rtol=1e-4, atol=1e-5)
            assert same == (projector == "per_task" or expert == 2)
        assert run.strategy.projectors is None or run.strategy.projectors._choice is None


def test_every_projector_starts_from_the_pretrained_one(steps: Make) -> None:
    run = steps("mrlora", **FAST)
    (path,) = run.towers.projector
    module = run.module.model.get_submodule(path)
    pretrained = [p.detach().clone() for p in module.parameters()]
    run.train(run.start(0))
    trained = {name: p.detach().clone() for name, p in module.named_parameters()}
    end(run, 0)
    assert not any(map(torch.equal, trained.values(), pretrained))
    run.start(1)
    assert all(map(torch.equal, module.parameters(), pretrained))
    assert list(run.strategy.projectors.kept) == [PRETRAINED, "colours"]
    kept = run.strategy.projectors.kept["colours"]
    assert len(kept) == len(trained)
    assert all(torch.equal(kept[f"{path}.{name}".replace(".", "/")], value) for name, value in trained.items())


def test_training_uses_the_tasks_own_expert_alone(steps: Make) -> None:
    run = learn(steps("mrlora", **FAST), 2)
    batch = asked(run)[0]
    with run.strategy.routing(run.towers, batch, "colours"):
        layer = next(iter(run.towers.adapters.values()))
        x = torch.randn(len(batch["id"]), 3, layer.in_features)
        expected = layer.base(x) + layer.scale * x @ layer.lora_a["colours"].T @ layer.lora_b["colours"].T
        torch.testing.assert_close(layer(x), expected)


def test_experts_are_exported_where_they_share_the_projector(steps: Make) -> None:
    run = learn(steps("mrlora", projector="shared", **FAST), 2)
    plain = run.strategy.plain_lora(run.towers)
    assert list(plain) == ["colours", "shapes"]
    assert plain["shapes"] == {path: ["shapes"] for path in run.towers.adapters}
    assert learn(steps("mrlora", **FAST), 1).strategy.plain_lora(run.towers) == {}


def test_experts_of_both_towers(steps: Make) -> None:
    targets = {"vision": ["q_proj"], "language": ["q_proj"]}
    run = learn(steps("mrlora", targets=targets, **FAST), 2)
    batches = asked(run)[:2]
    run.strategy._ask = lambda towers, batch: [TASKS.index(task) for task in batch["task"]]
    pad = run.module.processor.tokenizer.pad_token_id
    together = routed_logits(run.module, merge([rows(batch, [0, 1]) for batch in batches], pad))
    for row in range(4):
        alone = routed_logits(run.module, rows(batches[row // 2], [row % 2]))[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router_samples": 0}, "router_samples: is 0, must be at least 1"),
        ({"router_epochs": 0}, "router_epochs: is 0, must be at least 1"),
        ({"router_lr": float("nan")}, "router_lr: is nan, must be a finite number greater than 0"),
        ({"router_warmup_ratio": 2.0}, r"router_warmup_ratio: is 2.0, must be in \[0, 1\]"),
        ({"question": "{experts}"}, "question: does not contain {question}"),
        ({"question": "{question}"}, "question: does not contain {experts}"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MRLoRAConfig(**options)


def test_more_tasks_than_letters(steps: Make) -> None:
    run = steps("mrlora")
    stages = run.strategy.stages([f"task{number}" for number in range(27)])
    run.strategy.check(run.towers, stages[:26])
    with pytest.raises(ValueError, match="there are 26; `order` has 27 tasks"):
        run.strategy.check(run.towers, stages)


def test_the_callback_is_for_this_strategy(steps: Make) -> None:
    run = steps("sequential")
    with pytest.raises(ValueError, match=r"callbacks\.RouterTuning: strategy 'sequential' has no use for it"):
        RouterTuning().on_task_end(None, run.module, run.stages[0])  # type: ignore[arg-type]


def test_a_configuration_without_the_callback_is_refused(
    experiment: Callable[..., ExperimentConfig], tmp_path: Any
) -> None:
    with pytest.raises(
        ValueError, match=r"strategy 'mrlora' needs {_target_: callbacks\.RouterTuning}; add.*EXP=quickstart"
    ):
        experiment(tmp_path, "strategy={name: mrlora}")


def test_the_published_recipe_by_name() -> None:
    config = load_config("llava7b+mllm_cl_domain+mrlora")
    assert config.strategy["rank"] == 32 and config.strategy["alpha"] == 64
    assert load_config(experiments_dir() / "mrlora_quickstart.yaml").strategy["name"] == "mrlora"
