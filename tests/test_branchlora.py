"""MoELoRA and BranchLoRA: published sizes, routing that depends on the sample alone, and what freezes for ever."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.generation import generate_answers
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.loss import prompt_mask
from mcit_lightning.module import MCITModule
from mcit_lightning.plans import FreezeRecord
from mcit_lightning.runner import run
from mcit_lightning.stages import Stage, sequential_stages
from mcit_lightning.strategies import BranchLoRA, MoELoRA
from mcit_lightning.towers import Towers
from mcit_lightning.validation import build_strategy

TASKS = ["colours", "shapes", "counts"]
STAGES = sequential_stages(TASKS)
BRANCH = "strategy={name: branchlora, rank: 8, alpha: 16, experts: 4, top_k: 2}"


@pytest.fixture
def experiment(smoke_root: Path) -> Callable[..., ExperimentConfig]:
    def make(*overrides: str) -> ExperimentConfig:
        return load_config(
            experiments_dir() / "branchlora_smoke.yaml", [f"data.root={smoke_root}", "prepare=null", *overrides]
        )

    return make


def build(config: ExperimentConfig, stages: list[Stage], *, std: float = 0.1) -> MCITModule:
    """A module with the structure of some stages and random branches, in evaluation mode."""
    module = MCITModule(load_backbone(config.backbone), build_strategy(config.strategy), config)
    for stage in stages:
        module.grow(module.strategy.plan(stage, module.towers))
    torch.manual_seed(0)
    for layer in module.towers.adapters.values():
        for parameter in layer.lora_b.values():
            torch.nn.init.normal_(parameter, std=std)
    return module.eval()


def batches(config: ExperimentConfig, module: MCITModule) -> list[dict[str, Any]]:
    """One evaluation batch per task."""
    stream = ContinualDataModule(config, module.processor, STAGES)
    stream.evaluate_only(TASKS)
    return [next(iter(loader)) for loader in stream.test_dataloader()]


def merge(parts: list[dict[str, Any]], pad: int, extra: int = 0) -> dict[str, Any]:
    """Evaluation batches as one, left-padded to the longest and `extra` columns more."""
    length = max(part["inputs"]["input_ids"].shape[1] for part in parts) + extra

    def left(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (length - tensor.shape[1], 0), value=value)

    inputs = {
        "input_ids": torch.cat([left(part["inputs"]["input_ids"], pad) for part in parts]),
        "attention_mask": torch.cat([left(part["inputs"]["attention_mask"], 0) for part in parts]),
        "pixel_values": torch.cat([part["inputs"]["pixel_values"] for part in parts]),
    }
    lists = {key: [value for part in parts for value in part[key]] for key in ("task", "id", "num_images")}
    return {"inputs": inputs, **lists}


def rows(batch: dict[str, Any], index: list[int]) -> dict[str, Any]:
    """Some rows of an evaluation batch, each with one image."""
    inputs = {key: value[index] for key, value in batch["inputs"].items()}
    return {"inputs": inputs, **{key: [batch[key][i] for i in index] for key in ("task", "id", "num_images")}}


def last_logits(module: MCITModule, batch: dict[str, Any]) -> Tensor:
    """[B, vocabulary] after the prompt."""
    with torch.no_grad(), module.strategy.routing(module.towers, batch, None):
        mask = batch["inputs"]["attention_mask"]
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return module.model(**batch["inputs"], position_ids=positions).logits[:, -1]


@pytest.mark.parametrize(
    ("width", "inner", "layers", "moelora", "branchlora"),
    [(4096, 11008, 32, 349_904_896, 222_371_840), (5120, 13824, 40, 546_416_640, 346_859_520)],
    ids=["7B", "13B"],
)
def test_trainable_parameters_of_llava_are_the_published_ones(
    width: int, inner: int, layers: int, moelora: int, branchlora: int
) -> None:
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=2, num_attention_heads=16)
    text = LlamaConfig(
        vocab_size=32064, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=32
    )
    totals = []
    for name, kind in (("moelora", MoELoRA), ("branchlora", BranchLoRA)):
        with torch.device("meta"):
            model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
        towers = Towers.of(model)
        strategy = build_strategy({"name": name, "rank": 128, "alpha": 256, "experts": 8})
        assert isinstance(strategy, kind)
        strategy.grow(towers, strategy.plan(STAGES[0], towers))
        projector = sum(p.numel() for path in towers.projector for p in model.get_submodule(path).parameters())
        totals.append(sum(p.numel() for p in strategy.trainable(towers, STAGES[0])) + projector)
    assert totals == [moelora, branchlora]


@pytest.mark.parametrize("strategy", ["strategy={name: moelora, rank: 8, experts: 4}", BRANCH])
def test_zero_branches_give_the_base(strategy: str, experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(strategy)
    module = build(config, STAGES, std=0.0)
    base = build(experiment("strategy={name: zero_shot}"), [])
    for batch in batches(config, module):
        assert torch.equal(last_logits(module, batch), last_logits(base, batch))


@pytest.mark.parametrize("gate", ["first", "mean", "last", "token"])
def test_results_do_not_depend_on_the_rest_of_the_batch(gate: str, experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(BRANCH, f"strategy.gate_input={gate}", "strategy.selector=oracle")
    module = build(config, STAGES)
    pad = module.processor.tokenizer.pad_token_id
    mixed = merge([rows(batch, [0, 1, 2]) for batch in batches(config, module)], pad)
    expected = last_logits(module, mixed)
    assert len({tuple(route) for route in map(tuple, module.strategy.routed_to() or [])}) == 3
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1)).tolist()
    torch.testing.assert_close(last_logits(module, rows(mixed, order)), expected[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last_logits(module, merge([mixed], pad, extra=5)), expected, rtol=1e-4, atol=1e-5)
    for row in (0, 4, 8):
        torch.testing.assert_close(last_logits(module, rows(mixed, [row])), expected[[row]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gate", ["first", "mean", "token"])
def test_decoding_with_a_cache_equals_full_forwards(gate: str, experiment: Callable[..., ExperimentConfig]) -> None:
    """The gate is kept from the prefill; a full forward over prompt and answer must come to the same tokens."""
    config = experiment(BRANCH, f"strategy.gate_input={gate}")
    module = build(config, STAGES, std=0.3)
    pad, image_token = module.processor.tokenizer.pad_token_id, module.model.config.image_token_id
    batch = merge([rows(part, [0, 1]) for part in batches(config, module)], pad, extra=3)
    with module.strategy.routing(module.towers, batch, None):
        cached = module.model.generate(  # type: ignore[operator]
            **batch["inputs"], max_new_tokens=5, do_sample=False, eos_token_id=-1, suppress_tokens=[image_token]
        )
    tokens = batch["inputs"]["input_ids"]
    prompt = batch["inputs"]["attention_mask"]
    for _ in range(5):
        mask = torch.cat([prompt, torch.ones(len(tokens), tokens.shape[1] - prompt.shape[1], dtype=torch.long)], 1)
        state_batch = {**batch, "inputs": {**batch["inputs"]}}
        with torch.no_grad(), module.strategy.routing(module.towers, state_batch, None):
            if gate == "mean":  # the mean is over the prompt
                for layer in module.towers.adapters.values():
                    layer.gate.state.mask = torch.nn.functional.pad(prompt, (0, tokens.shape[1] - prompt.shape[1]))  # type: ignore[union-attr]
            logits = module.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                pixel_values=batch["inputs"]["pixel_values"],
            ).logits
        logits[..., image_token] = -torch.inf
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(cached, tokens)


def test_beams_share_their_samples_gate(experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(BRANCH, "strategy.gate_input=mean")
    module = build(config, STAGES, std=0.3)
    batch = merge([rows(part, [0, 1]) for part in batches(config, module)], module.processor.tokenizer.pad_token_id)

    def beams(part: dict[str, Any]) -> Tensor:
        with module.strategy.routing(module.towers, part, None):
            return module.model.generate(
                **part["inputs"], max_new_tokens=4, num_beams=3, do_sample=False, eos_token_id=-1
            )  # type: ignore[operator]

    together = beams(batch)
    for row in range(6):
        assert torch.equal(beams(rows(batch, [row])), together[[row]])


def test_the_first_token_gate_is_a_constant_of_task_and_module(experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(BRANCH, "strategy.selector=oracle")
    module = build(config, STAGES)
    batch = rows(batches(config, module)[0], [0, 1, 2, 3])
    module.strategy.train()  # type: ignore[no-untyped-call]
    module.strategy.config.router_noise = 0.0
    with torch.no_grad(), module.strategy.routing(module.towers, batch, "colours"):
        module.model(**batch["inputs"])
    assert isinstance(module.strategy, BranchLoRA)
    count, mass = module.strategy.usage(module.towers.adapters).unbind(1)
    assert count.shape == (14, 4) and set(count.unique().tolist()) == {0.0, 4.0}
    torch.testing.assert_close(mass.sum(1), torch.full((14,), 4.0))


def test_usage_counts_once_under_activation_checkpointing(experiment: Callable[..., ExperimentConfig]) -> None:
    usages, gradients = [], []
    for enabled in (False, True):
        config = experiment(BRANCH, f"backbone.activation_checkpointing={enabled}")
        module = build(config, STAGES[:1])
        for layer in module.towers.adapters.values():
            layer.requires_grad_(True)
        stream = ContinualDataModule(config, module.processor, STAGES)
        batch = next(iter(stream.train_dataloader()))
        module.train()
        with module.strategy.routing(module.towers, batch, "colours"):
            output = module.strategy.loss(module.model, batch, STAGES[0])
        output.loss.backward()
        assert isinstance(module.strategy, BranchLoRA)
        usages.append(module.strategy.usage(module.towers.adapters))
        layer = next(iter(module.towers.adapters.values()))
        gradients.append([layer.routers["colours"].grad, layer.lora_a["trunk"].grad, layer.lora_b["expert1"].grad])
    assert torch.equal(usages[0], usages[1]) and usages[0][:, 0].sum(1).unique().tolist() == [2 * 4.0]
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two)


def test_prompt_mask_ends_where_the_answer_starts(experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(BRANCH)
    module = build(config, [])
    stream = ContinualDataModule(config, module.processor, STAGES)
    batch = next(iter(stream.train_dataloader()))
    mask, ids = prompt_mask(batch), batch["inputs"]["input_ids"]
    targets = batch["targets"].tolist()
    for row in range(len(ids)):
        answer = [token for token, owner in zip(targets, batch["rows"].tolist(), strict=True) if owner == row]
        size = int(mask[row].sum())
        assert mask[row, :size].all() and ids[row, size : size + len(answer)].tolist() == answer


def test_most_used_branches_freeze_with_ties_by_mass_then_index(experiment: Callable[..., ExperimentConfig]) -> None:
    module = build(experiment(BRANCH), STAGES[:1])
    strategy = module.strategy
    assert isinstance(strategy, BranchLoRA)
    path, layer = next(iter(module.towers.adapters.items()))
    count, mass = torch.tensor([[5.0, 9, 5, 0]]), torch.tensor([[1.0, 4, 2, 0]])
    assert strategy.most_used({path: layer}, count, mass) == {path: ["expert1", "expert2"]}
    assert strategy.most_used({path: layer}, count, torch.tensor([[2.0, 4, 2, 0]])) == {path: ["expert1", "expert0"]}
    strategy.freeze(module.towers, FreezeRecord("colours", {path: ["expert1"]}))
    strategy.config.freeze_only_tunable = True
    assert strategy.most_used({path: layer}, count, mass) == {path: ["expert2", "expert0"]}
    trainable = {id(parameter) for parameter in strategy.trainable(module.towers, STAGES[0])}
    assert id(layer.lora_b["expert1"]) not in trainable and id(layer.lora_b["expert0"]) in trainable


SMALL = (
    "data.limit_train=12",
    "data.limit_val=4",
    "data.limit_test=4",
    "trainer.accelerator=cpu",
    "trainer.enable_progress_bar=false",
    "zero_shot=false",
    "callbacks=[{_target_: callbacks.RouterSpawn}, {_target_: callbacks.BranchFreeze}, {_target_: callbacks.StageCost},"
    " {_target_: callbacks.BackwardTransfer}, {_target_: kill.KillAt}, {_target_: callbacks.StageCheckpoint, every_n_steps: 1}]",
)


def test_what_froze_and_old_routers_stay_bit_identical(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    run(experiment(BRANCH, f"out={tmp_path / 'run'}", *SMALL))
    states, frozen = [], set()
    for number in (1, 2, 3):
        checkpoint = torch.load(tmp_path / f"run/stage_{number:02d}/final.ckpt", weights_only=True)
        states.append(checkpoint["state_dict"])
        for name, value in states[-1].items():
            if isinstance(value, Tensor) and (
                name in frozen or any(f".routers.{t}" in name for t in TASKS[: number - 1])
            ):
                assert torch.equal(value, states[-2][name]), name
        record = checkpoint["mcit"]["structure"][-1]
        assert record["kind"] == "FreezeRecord" and {len(names) for names in record["branches"].values()} == {2}
        frozen |= {f"model.{path}.lora_b.{name}" for path, names in record["branches"].items() for name in names}
    moved = [name for name in states[2] if ".lora_b." in name and not torch.equal(states[2][name], states[0][name])]
    assert moved and not set(moved) & {
        f"model.{path}.lora_b.{name}"
        for path, names in torch.load(tmp_path / "run/stage_01/final.ckpt", weights_only=True)["mcit"]["structure"][1][
            "branches"
        ].items()
        for name in names
    }
    results = (tmp_path / "run" / "results.json").read_text()
    assert '"routing"' in results


def test_killed_and_resumed_with_routers_noise_and_counts(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kill

    run(experiment(BRANCH, f"out={tmp_path / 'whole'}", *SMALL))
    config = experiment(BRANCH, f"out={tmp_path / 'run'}", *SMALL)
    for point in (("batch", 1, 1), ("end", 1), ("test", 2, 1)):
        monkeypatch.setattr(kill, "POINT", point)
        with pytest.raises(kill.Killed):
            run(config)
    run(config)
    for number in (1, 2, 3):
        whole, again = (
            torch.load(tmp_path / folder / f"stage_{number:02d}/final.ckpt", weights_only=True)
            for folder in ("whole", "run")
        )
        assert whole["mcit"]["structure"] == again["mcit"]["structure"]
        assert whole["state_dict"].keys() == again["state_dict"].keys()
        for name, value in whole["state_dict"].items():
            assert torch.equal(value, again["state_dict"][name]), name


def test_keys_find_the_task_of_mixed_and_text_only_samples(experiment: Callable[..., ExperimentConfig]) -> None:
    """Closed form: the key is the direction of the mean unit embedding, so orthogonal tasks are always told apart."""
    strategy = build_strategy({"name": "branchlora"})
    assert isinstance(strategy, BranchLoRA)
    selector = strategy.selector
    one = torch.ones(2)
    for index, task in enumerate(TASKS):
        selector.add_task(task, 3, 3, torch.device("cpu"))
        image = torch.nn.functional.one_hot(torch.tensor([index, index]), 3).float() * torch.tensor([[1.0], [50.0]])
        selector.update(task, image, one, image + 0.1)
    eye = torch.eye(3)
    assert selector.scores(eye, torch.ones(3), eye).argmax(1).tolist() == [0, 1, 2]
    assert selector.scores(torch.zeros(3, 3), torch.zeros(3), eye).argmax(1).tolist() == [0, 1, 2]
    # image and text disagree: the sum decides
    assert selector.scores(eye[[0]], torch.ones(1), eye[[0]] * 0.2 + eye[[1]]).argmax(1).tolist() == [0]


def test_generation_of_a_batch_equals_single_samples(experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment(BRANCH)
    module = build(config, STAGES, std=0.3)
    batch = merge([rows(part, [0, 1]) for part in batches(config, module)], module.processor.tokenizer.pad_token_id)

    def answers(part: dict[str, Any]) -> list[str]:
        with module.strategy.routing(module.towers, part, None):
            return generate_answers(module.model, module.processor, part["inputs"], 4, -1)

    assert answers(batch) == [answers(rows(batch, [row]))[0] for row in range(6)]


def test_merged_task_gives_the_same_answers_and_unmerges_exactly(experiment: Callable[..., ExperimentConfig]) -> None:
    module = build(experiment(BRANCH, "strategy.selector=oracle"), STAGES, std=0.3)
    strategy = module.strategy
    assert isinstance(strategy, BranchLoRA)
    batch = batches(module.config, module)[1]
    expected = last_logits(module, batch)
    before = {path: layer.base.weight for path, layer in module.towers.adapters.items()}
    with strategy.merged(module.towers, batch, "shapes"):
        assert not any(layer.base.weight is before[path] for path, layer in module.towers.adapters.items())
        positions = (batch["inputs"]["attention_mask"].cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            merged = module.model(**batch["inputs"], position_ids=positions).logits[:, -1]
    torch.testing.assert_close(merged, expected, rtol=1e-4, atol=1e-4)
    assert all(layer.base.weight is before[path] for path, layer in module.towers.adapters.items())
    assert torch.equal(last_logits(module, batch), expected)
    with pytest.raises(ValueError, match="'squares' has no router; learnt: colours, shapes, counts"):  # noqa: SIM117
        with strategy.merged(module.towers, batch, "squares"):
            pass
    strategy.gate_input = "mean"
    with pytest.raises(ValueError, match="gate_input: is 'mean'"):  # noqa: SIM117
        with strategy.merged(module.towers, batch, "shapes"):
            pass
