"""Learned vectors in the decoder's input: where they stand, and that the model sees them as it sees tokens."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from PIL import Image
from test_towers import tiny_llava
from torch import Tensor

from mcit_lightning.backbone import Backbone, load_backbone
from mcit_lightning.config import BackboneConfig, PromptConfig
from mcit_lightning.data.collate import EvalCollator, TrainCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.generation import generate_tokens
from mcit_lightning.loss import answer_logits, prompt_mask
from mcit_lightning.soft_prompts import SoftPrompts
from mcit_lightning.towers import Towers

IMAGE = 3
"""The image token of `tiny_llava`."""
TOKENS = [[107, 111, 105], [120, 102, 131], [109, 109, 114]]
"""Ordinary tokens of every tiny checkpoint, other ones for every row."""

VICUNA = ("llava", "llava_next")
"""Families whose processors have no chat template here."""


def test_a_training_batch_by_hand() -> None:
    """Two rows, right-padded; the answers are tokens 3 and 4 of the first row and token 2 of the second."""
    batch = {
        "inputs": {
            "input_ids": torch.tensor([[1, 5, 6, 7, 8], [1, 5, 9, 0, 0]]),
            "attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
            "mm_token_type_ids": torch.tensor([[0, 1, 1, 0, 0], [0, 1, 0, 0, 0]]),
            "pixel_values": torch.zeros(2, 5),  # as many as tokens, but no tokens
        },
        "targets": torch.tensor([7, 8, 9]),
        "positions": torch.tensor([2, 3, 5 + 1]),
        "rows": torch.tensor([0, 0, 1]),
    }
    kept = batch["inputs"]["input_ids"].clone()
    longer = SoftPrompts(torch.zeros(2, 2, 4), torch.tensor([1, 1]), placeholder=99).extend(batch)
    assert longer["inputs"]["input_ids"].tolist() == [[1, 99, 99, 5, 6, 7, 8], [1, 99, 99, 5, 9, 0, 0]]
    assert longer["inputs"]["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]]
    assert longer["inputs"]["mm_token_type_ids"].tolist() == [[0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0, 0]]
    assert longer["inputs"]["pixel_values"] is batch["inputs"]["pixel_values"]
    assert longer["positions"].tolist() == [4, 5, 7 + 3]
    predicted = longer["inputs"]["input_ids"].flatten()[longer["positions"] + 1]
    assert torch.equal(predicted, longer["targets"]) and longer["targets"] is batch["targets"]
    assert prompt_mask(longer).tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0]]
    assert torch.equal(batch["inputs"]["input_ids"], kept) and batch["positions"].tolist() == [2, 3, 6]


def test_an_evaluation_batch_by_hand() -> None:
    """Left-padded: the first real token is elsewhere in every row, and a picture is not torn apart."""
    towers = Towers.of(tiny_llava())
    ids = torch.tensor([[1, 5, 6, 7], [0, 0, 1, 8], [0, IMAGE, IMAGE, 8]])
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
    batch = {"inputs": {"input_ids": ids, "attention_mask": mask}}
    prompts = SoftPrompts.behind_first_token(towers, batch, torch.zeros(3, 2, 16))
    assert prompts.before.tolist() == [1, 3, 1]
    p = prompts.placeholder
    longer = prompts.extend(batch)["inputs"]
    assert longer["input_ids"].tolist() == [[1, p, p, 5, 6, 7], [0, 0, 1, p, p, 8], [0, p, p, IMAGE, IMAGE, 8]]
    assert longer["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]]


def test_only_the_vectors_of_a_sample_move_its_logits() -> None:
    model = tiny_llava().eval()
    towers = Towers.of(model)
    ids = torch.randint(4, 40, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}

    def logits(vectors: Tensor) -> Tensor:
        prompts = SoftPrompts.behind_first_token(towers, batch, vectors)
        with torch.no_grad(), prompts.placed(towers, ids.shape[1] + vectors.shape[1]):
            return model(**prompts.extend(batch)["inputs"]).logits[:, vectors.shape[1] :]

    vectors = torch.randn(3, 2, 16, generator=torch.Generator().manual_seed(1))
    before = logits(vectors)
    moved = vectors.clone()
    moved[1] += 1.0
    after = logits(moved)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.allclose(before[1], after[1])
    assert torch.equal(logits(vectors), before), "the hook is gone with its context"


def test_the_model_must_be_given_the_longer_rows() -> None:
    model = tiny_llava().eval()
    towers = Towers.of(model)
    ids = torch.tensor([[1, 5, 6, 7]])
    batch = {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    prompts = SoftPrompts.behind_first_token(towers, batch, torch.zeros(1, 2, 16))
    with prompts.placed(towers, 6), pytest.raises(AssertionError, match=r"ContinualStrategy\.inputs"):
        model(**batch["inputs"])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_embeddings_and_nothing_else_gets_any(checkpointing: bool) -> None:
    model = tiny_llava().requires_grad_(False).train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    towers = Towers.of(model)
    ids = torch.tensor([[1, 5, 6, 7], [1, 8, 9, 4]])
    batch = {"inputs": {"input_ids": ids, "attention_mask": torch.ones_like(ids)}}
    vectors = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    prompts = SoftPrompts.behind_first_token(towers, batch, vectors)
    with prompts.placed(towers, 6):
        loss = model(**prompts.extend(batch)["inputs"]).logits[:, -1].square().sum()
    (found,) = torch.autograd.grad(loss, vectors)  # outside of the context, as a training step does it
    table = model.get_input_embeddings().weight[ids]
    rows = torch.cat([table[:, :1], vectors, table[:, 1:]], 1)
    (expected,) = torch.autograd.grad(model(inputs_embeds=rows).logits[:, -1].square().sum(), vectors)
    torch.testing.assert_close(found, expected)
    assert all(parameter.grad is None for parameter in model.parameters())


# In every family, vectors that are the embeddings of tokens do what the tokens do


@pytest.fixture(scope="module", params=list(families.FAMILIES))
def backbone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    if request.param == "smolvlm":
        pytest.importorskip("num2words", reason="SmolVLM2's processor needs it")
    folder = families.build(request.param, tmp_path_factory.mktemp("families") / request.param)
    backbone = load_backbone(BackboneConfig(id=str(folder)))
    torch.manual_seed(0)
    for parameter in backbone.model.parameters():  # answers that depend on what is asked
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.2)
    return backbone


@pytest.fixture(scope="module")
def prompt(backbone: Backbone) -> PromptConfig:
    return PromptConfig(template="vicuna" if backbone.model.config.model_type in VICUNA else "chat")


@pytest.fixture
def samples(tmp_path: Path) -> list[Sample]:
    for name, size in (("wide", (64, 40)), ("tall", (40, 90))):
        Image.new("RGB", size, (200, 30, 30)).save(tmp_path / f"{name}.png")
    wide, tall = ((str(tmp_path / f"{name}.png"),) for name in ("wide", "tall"))
    answer = ("assistant", "red")
    return [
        Sample("a", "t", wide, (("user", "What colour is this?"), answer)),
        Sample("b", "t", (), (("user", "Which one? Which one? red"), answer)),
        Sample("c", "t", tall, (("user", "red?"), answer)),
    ]


def with_tokens(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch with `TOKENS` behind the first token of each row, row by row."""
    longer = dict(batch["inputs"])
    like_ids = [key for key, value in longer.items() if value.shape == longer["input_ids"].shape]
    for key in like_ids:
        rows = []
        for row, mask, tokens in zip(longer[key].tolist(), longer["attention_mask"].tolist(), TOKENS, strict=True):
            at = mask.index(1) + 1
            new = {"input_ids": tokens, "attention_mask": [1, 1, 1]}.get(key, [0, 0, 0])
            rows.append(row[:at] + new + row[at:])
        longer = {**longer, f"longer {key}": torch.tensor(rows)}
    return {key.removeprefix("longer "): value for key, value in longer.items()}


def as_vectors(backbone: Backbone, batch: dict[str, Any]) -> SoftPrompts:
    vectors = backbone.model.get_input_embeddings().weight[torch.tensor(TOKENS)].detach()
    return SoftPrompts.behind_first_token(backbone.towers, batch, vectors)


def test_answers_are_those_to_the_same_tokens(backbone: Backbone, prompt: PromptConfig, samples: list[Sample]) -> None:
    """Generation with its KV cache, of left-padded rows."""
    asked = [Sample(s.id, s.task, s.images, s.turns[:1]) for s in samples]
    batch = EvalCollator(backbone.processor, prompt)(asked)
    expected = generate_tokens(backbone.model, with_tokens(batch), 5, end_id=-1)
    prompts = as_vectors(backbone, batch)
    inputs = prompts.extend(batch)["inputs"]
    with prompts.placed(backbone.towers, inputs["input_ids"].shape[1]):
        found = generate_tokens(backbone.model, inputs, 5, end_id=-1)
    assert torch.equal(found, expected)
    assert not torch.equal(generate_tokens(backbone.model, batch["inputs"], 5, end_id=-1), expected)


def test_the_loss_sees_the_same_answer_tokens(backbone: Backbone, prompt: PromptConfig, samples: list[Sample]) -> None:
    batch = TrainCollator(backbone.processor, prompt, max_length=600)(samples)
    inputs = with_tokens(batch)
    with torch.no_grad():
        hidden = backbone.model(**inputs).logits
        prompts = as_vectors(backbone, batch)
        longer = prompts.extend(batch)
        with prompts.placed(backbone.towers, inputs["input_ids"].shape[1]):
            found = answer_logits(backbone.model, longer)
    following = inputs["input_ids"].roll(-1, 1)
    rows, columns = longer["rows"], longer["positions"] % inputs["input_ids"].shape[1]
    assert torch.equal(following[rows, columns], batch["targets"])
    torch.testing.assert_close(found, hidden[rows, columns])
