"""SMoLoRA: gates and fusion worked by hand, what each router sees, and what trains."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dmole_model import evaluation_batches, routed_logits
from sentence_checkpoint import POSITIONS, WIDTH, write_sentence_encoder
from smoke_runs import adapters
from stage_steps import Make
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.collate import EvalCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.runner import run
from mcit_lightning.sentence_encoder import SentenceEncoder
from mcit_lightning.separable import FUSION, INSTRUCTION, VISUAL, AdaptiveFusion, SeparableGate, SeparableState
from mcit_lightning.strategies import SMoLoRAConfig
from mcit_lightning.trained import load_trained

LN2, LN3 = math.log(2), math.log(3)
SHORT, LONG = "Answer with one word.", "What colour is this?\nAnswer with one word."


def layer(*, top_k: int = 1, inner: int = 1, experts: int = 4) -> AdapterLinear:
    """3 -> 5, with instructions of width 2 and random weights everywhere."""
    torch.manual_seed(0)
    made = AdapterLinear(nn.Linear(3, 5), scale=2.0)
    made.add_branch("experts", inner * experts, seed=0, path="q", gates=experts)
    for name, width in ((VISUAL, 3), (INSTRUCTION, 2)):
        made.add_router(name, seed=0, path="q", shape=(experts // 2, width))
    made.add_router(FUSION, seed=0, path="q", shape=(2, 5))
    for _, parameter in made.adapter_parameters():
        nn.init.normal_(parameter)
    made.gate = SeparableGate("q", made, top_k)
    made.fusion = AdaptiveFusion(made.gate)
    return made


def show(module: AdapterLinear, mask: list[list[int]], instruction: Tensor, *, generating: bool = False) -> Tensor:
    """Give the gate a batch; a random input for it."""
    assert isinstance(module.gate, SeparableGate)
    module.gate.state = SeparableState(mask=torch.tensor(mask), instruction=instruction, generating=generating)
    return torch.randn(len(mask), len(mask[0]), 3)


def formula(module: AdapterLinear, x: Tensor, gate: Tensor) -> Tensor:
    """The paper's: each group's answer whole, a score of each, and their mixture. `gate` is [B, N]."""
    half, inner = gate.shape[1] // 2, len(module.lora_a["experts"]) // gate.shape[1]
    answers, scores = [], []
    for group, importance in enumerate(module.routers[FUSION]):
        answer = torch.zeros(*x.shape[:2], module.out_features)
        for expert in range(group * half, (group + 1) * half):
            columns = slice(expert * inner, (expert + 1) * inner)
            a, b = module.lora_a["experts"][columns], module.lora_b["experts"][:, columns]
            answer = answer + module.scale * gate[:, expert, None, None] * (x @ a.T @ b.T)
        answers.append(answer)
        scores.append(answer @ importance)
    weights = torch.stack(scores, -1).softmax(-1)
    return module.base(x) + weights[..., :1] * answers[0] + weights[..., 1:] * answers[1]


def test_gates_by_hand() -> None:
    """The prompt's tokens average to [1, 1, 0]: logits ln 1, ln 3, ln 2 of the visual experts; of the others 0, ln 2, -9."""
    made = layer(experts=6)
    made.routers[VISUAL].data = torch.tensor([[0.0, 0, 5], [LN3, 0, 5], [0, LN2, 5]])
    made.routers[INSTRUCTION].data = torch.tensor([[0.0, 7], [LN2, 7], [-9, 7]])
    x = torch.tensor([[[2.0, 0, 0], [0, 2, 0], [8, 9, 9]]])
    for top_k, expected in ((1, [0, 1, 0, 0, 1, 0]), (2, [0, 0.6, 0.4, 1 / 3, 2 / 3, 0])):
        gate = SeparableGate("q", made, top_k)
        gate.state = SeparableState(mask=torch.tensor([[1, 1, 0]]), instruction=torch.tensor([[1.0, 0]]))
        torch.testing.assert_close(gate(x), torch.tensor([expected], dtype=torch.float32))


def test_fusion_by_hand() -> None:
    """Answers [3, 0] and [0, 4] that score ln 3 and 0: weights 3/4 and 1/4."""
    made = AdapterLinear(nn.Linear(1, 2, bias=False), scale=1.0)
    made.base.weight.data.zero_()
    made.add_branch("experts", 2, seed=0, path="q", gates=2)
    made.lora_a["experts"].data = torch.ones(2, 1)
    made.lora_b["experts"].data = torch.tensor([[3.0, 0], [0, 4]])
    made.add_router(FUSION, seed=0, path="q", shape=(2, 2))
    made.routers[FUSION].data = torch.tensor([[LN3 / 3, 9], [9, 0]])
    for name, width in ((VISUAL, 1), (INSTRUCTION, 1)):
        made.add_router(name, seed=0, path="q", shape=(1, width))
    made.gate = SeparableGate("q", made, 1)
    made.fusion = AdaptiveFusion(made.gate)
    made.gate.state = SeparableState(mask=torch.ones(1, 1), instruction=torch.ones(1, 1))
    torch.testing.assert_close(made(torch.ones(1, 1, 1)), torch.tensor([[[0.75 * 3, 0.25 * 4]]]))


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("inner", [1, 3])
def test_the_layer_and_its_gradients_are_the_formula(top_k: int, inner: int) -> None:
    found: list[list[Tensor]] = []
    for by_hand in (False, True):
        made = layer(top_k=top_k, inner=inner)
        x = show(made, [[1, 1, 1, 0], [0, 1, 1, 1]], torch.randn(2, 2)).requires_grad_()
        assert isinstance(made.gate, SeparableGate)
        y = formula(made, x, made.gate(x)) if by_hand else made(x)
        (y * torch.arange(5.0)).square().sum().backward()
        routers = [] if top_k == 1 else [made.routers[VISUAL].grad, made.routers[INSTRUCTION].grad]
        named = [made.lora_a["experts"].grad, made.lora_b["experts"].grad, made.routers[FUSION].grad, *routers]
        found.append([y.detach(), x.grad, *named])  # type: ignore[list-item]
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_one_expert_a_group_leaves_the_routers_without_gradient() -> None:
    made = layer(top_k=1)
    made(show(made, [[1, 1]], torch.randn(1, 2))).sum().backward()
    assert made.routers[VISUAL].grad is None and made.routers[INSTRUCTION].grad is None
    assert made.routers[FUSION].grad is not None


def test_a_generation_keeps_what_the_prompt_decided() -> None:
    made = layer()
    prompt = show(made, [[1, 1, 1]] * 8, torch.randn(8, 2), generating=True)
    assert isinstance(made.gate, SeparableGate)
    with torch.no_grad(), made.keep():
        made(prompt)
        gate, later = made.gate(prompt), torch.randn(8, 1, 3)
        torch.testing.assert_close(made(later), formula(made, later, gate))
    assert isinstance(made.gate.state, SeparableState)
    assert not torch.equal(made.gate._weights(made.gate._logits(later[:, 0], made.gate.state)), gate)
    made.gate.state.forget()
    assert not made.gate.state.decided and not made.gate.state.answers


def test_beams_stay_next_to_each_other() -> None:
    made = layer()
    x = show(made, [[1, 1], [1, 1]], torch.randn(2, 2))
    once = made(x)
    torch.testing.assert_close(made(x.repeat_interleave(3, 0)), once.repeat_interleave(3, 0))


def routers(run: object) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": layer.routers[name].detach().clone()
        for path, layer in run.towers.adapters.items()  # type: ignore[attr-defined]
        for name in (VISUAL, INSTRUCTION)
    }


@pytest.mark.parametrize(
    ("options", "moves"),
    [({}, [False, False]), ({"top_k": 2}, [True, True]), ({"top_k": 2, "freeze_routers": True}, [True, False])],
)
def test_when_routers_train(steps: Make, options: dict[str, object], moves: list[bool]) -> None:
    run = steps("smolora", **{"rank": 8, "experts": 4, **options})
    run.strategy.grow(run.towers, run.strategy.plan(run.stages[0], run.towers))
    for index, moved in enumerate(moves):
        before = routers(run)
        stage = run.start(index)
        run.train(stage, 3)
        run.end(stage)
        assert [not torch.equal(value, before[name]) for name, value in routers(run).items()] == [moved] * len(before)


def test_each_router_sees_its_own_side(steps: Make, tmp_path: Path) -> None:
    """Another picture changes the visual experts alone, another instruction the others in the first layer."""
    encoder = str(write_sentence_encoder(tmp_path / "sbert"))
    run = steps("smolora", rank=16, experts=16, instruction_encoder=encoder, instructions=[SHORT, "In a sentence."])
    run.stream.train_collator.reader = run.strategy.sample_reader()
    run.learn(1)
    asked = ["What is it? " + SHORT, "Which one, if you please? " + SHORT, "What is it? In a sentence."]
    sample = next(iter(run.stream.split("colours", "test")))
    collate = EvalCollator(run.module.processor, run.module.config.prompt)
    collate.reader = run.strategy.sample_reader()
    batch = collate([Sample(id=text, task="?", images=sample.images, turns=(("user", text),)) for text in asked])

    def gates() -> dict[str, Tensor]:
        with run.strategy.routing(run.towers, batch, None), torch.no_grad():
            run.module.model(**batch["inputs"])
            return dict(run.strategy.state.decided)

    run.module.eval()
    there = gates()
    batch["inputs"]["pixel_values"] = -3 * batch["inputs"]["pixel_values"]
    elsewhere = gates()
    assert len(there) == len(run.towers.adapters) > 3
    assert all(torch.equal(gate[:, 8:], elsewhere[path][:, 8:]) for path, gate in there.items())
    assert any(not torch.equal(gate[:, :8], elsewhere[path][:, :8]) for path, gate in there.items())
    assert all(torch.equal(gate[0, 8:], gate[1, 8:]) for gate in there.values()), "the question is no part of it"
    assert any(not torch.equal(gate[0, 8:], gate[2, 8:]) for gate in there.values())
    assert all(gate.sum(1).tolist() == [2, 2, 2] for gate in there.values())


def test_without_an_encoder_the_prompt_s_text_is_the_instruction(steps: Make) -> None:
    run = steps("smolora", rank=8, experts=4).learn(1)
    batch = evaluation_batches(run.stream)[0]
    ids, table = batch["inputs"]["input_ids"][0], run.module.model.get_input_embeddings().weight
    text = (batch["inputs"]["attention_mask"][0] > 0) & (ids != run.module.processor.image_token_id)
    assert 0 < text.sum() < len(ids)
    torch.testing.assert_close(run.strategy.embed(run.towers, batch)[0], table[ids[text]].mean(0))


def test_the_longest_listed_instruction_is_found(tmp_path: Path) -> None:
    reader = SentenceEncoder(str(write_sentence_encoder(tmp_path)), [SHORT, LONG, "Describe."]).reader
    assert reader.instruction("Is it red?\n" + SHORT) == SHORT
    assert reader.instruction("<image> What colour is\nthis?  Answer with one word. ") == " ".join(LONG.split())
    assert reader.instruction("Is  it\nred?") == "Is it red?"


def test_a_sentence_is_the_mean_of_its_own_tokens(tmp_path: Path) -> None:
    encoder = SentenceEncoder(str(write_sentence_encoder(tmp_path)), [])
    texts = ["abc", "a longer one", "z" * 100]
    samples = [Sample(id=text, task="t", images=(), turns=(("user", text),)) for text in texts]
    inputs = encoder.reader(samples, [sample.turns for sample in samples])
    together = encoder.embed({"strategy_inputs": inputs})
    assert encoder.width == WIDTH and together.shape == (3, WIDTH) and inputs["input_ids"].shape == (3, POSITIONS)
    for row, sample in enumerate(samples):
        alone = encoder.reader([sample], [sample.turns])
        with torch.no_grad():
            expected = encoder.model(**alone).last_hidden_state[0].mean(0)
        torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-5)


def test_what_is_no_sentence_encoder_is_refused(smoke_root: Path, tmp_path: Path) -> None:
    half = write_sentence_encoder(tmp_path / "half")
    (half / "model.safetensors").unlink()
    for name in (str(tmp_path), str(smoke_root / "model"), str(half)):
        with pytest.raises(ValueError, match=r"strategy\.instruction_encoder: cannot load .*Give a folder") as error:
            SentenceEncoder(name, [])
        assert "\n" not in str(error.value)


def test_a_run_with_a_sentence_encoder(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    """The encoder is no part of a checkpoint, and the answers are found again from it."""
    encoder = write_sentence_encoder(tmp_path / "sbert")
    strategy = f"{{name: smolora, experts: 4, instruction_encoder: {encoder}, instructions: ['one word']}}"
    config = experiment(tmp_path / "run", f"strategy={strategy}", "zero_shot=false", "order=[colours,counts]")
    run(config)
    saved = next(iter(adapters(tmp_path / "run").values()))
    assert not [name for name in saved if name.startswith("strategy.")]
    assert {value.shape[1] for name, value in saved.items() if name.endswith("routers.instruction")} == {WIDTH}
    first, second = (load_trained(tmp_path / "run").module for _ in range(2))
    collate = EvalCollator(first.processor, config.prompt)
    collate.reader = first.strategy.sample_reader()  # type: ignore[operator]
    batch = collate([Sample(id="1", task="?", images=(), turns=(("user", "Is it red? one word"),))])
    assert torch.equal(routed_logits(first, batch), routed_logits(second, batch))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 3, "rank": 9}, "experts: is 3, must be even"),
        ({"experts": 3}, "experts: 3 must divide rank"),
        ({"top_k": 5}, "top_k: is 5, must be between 1 and half of the experts"),
        ({"top_k": 0}, "top_k: "),
        ({"freeze_routers": True}, "freeze_routers: has no effect with top_k: 1"),
        ({"targets": {"vision": ["q_proj"]}}, "targets: SMoLoRA adapts the language model alone"),
        ({"instructions": ["Describe."]}, "instructions: need an instruction_encoder"),
        ({"instructions": [" "], "instruction_encoder": "x"}, "instructions: must not hold an empty text"),
    ],
)
def test_wrong_values_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMoLoRAConfig(**options)  # type: ignore[arg-type]
