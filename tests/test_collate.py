import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from mcit_lightning.config import PromptConfig
from mcit_lightning.data.collate import EvalCollator, TrainCollator
from mcit_lightning.data.prompts import VICUNA_SYSTEM, build_template
from mcit_lightning.data.records import Sample, Turns

TEMPLATES = ["chat", "vicuna", "plain"]
IMAGE_TOKENS = 9
ONE: Turns = (("user", "Which colour is this?"), ("assistant", "red"))
TWO: Turns = (("user", "Hi"), ("assistant", "blue one"), ("user", "and now?"), ("assistant", "green"))


@pytest.fixture(scope="module")
def picture(smoke_root: Path) -> str:
    return str(smoke_root / "colours/images/train_00000.png")


@pytest.fixture(scope="module")
def model(smoke_root: Path) -> Any:
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_pretrained(smoke_root / "model").eval()


@pytest.fixture
def samples(picture: str) -> list[Sample]:
    return [
        Sample("a", "colours", (picture,), ONE),
        Sample("b", "chat", (), TWO),
        Sample("c", "counts", (picture, picture), (("user", "How many dots are there?"), ("assistant", "two"))),
    ]


def collator(processor: Any, template: Any = "chat", max_length: int = 500) -> TrainCollator:
    return TrainCollator(processor, PromptConfig(template=template), max_length=max_length)


# Targets


@pytest.mark.parametrize("template", TEMPLATES)
def test_targets_are_exactly_the_answers(smoke_processor: Any, samples: list[Sample], template: str) -> None:
    batch = collator(smoke_processor, template)(samples)
    lead, end = (" " if template == "vicuna" else ""), smoke_processor.tokenizer.eos_token
    for row, answers in enumerate((["red"], ["blue one", "green"], ["two"])):
        text = smoke_processor.tokenizer.decode(batch["targets"][batch["rows"] == row])
        assert text == "".join(f"{lead}{answer}{end}" for answer in answers)
    ids = batch["inputs"]["input_ids"]
    assert torch.equal(ids.flatten()[batch["positions"] + 1], batch["targets"])
    assert torch.equal(batch["positions"] // ids.shape[1], batch["rows"])
    assert torch.equal((ids == smoke_processor.image_token_id).sum(1), torch.tensor([1, 0, 2]) * IMAGE_TOKENS)
    assert batch["num_tokens"] == int(batch["inputs"]["attention_mask"].sum())
    assert (batch["task"], batch["id"]) == (["colours", "chat", "counts"], ["a", "b", "c"])
    assert (batch["shortened"], batch["dropped"], batch["cut"]) == (0, 0, [None] * 3)


@pytest.mark.parametrize("template", TEMPLATES)
def test_positions_give_the_loss_of_the_model(
    smoke_processor: Any, model: Any, samples: list[Sample], template: str
) -> None:
    batch = collator(smoke_processor, template)(samples)
    labels = torch.full_like(batch["inputs"]["input_ids"], -100)
    labels.view(-1)[batch["positions"] + 1] = batch["targets"]
    with torch.no_grad():
        output = model(**batch["inputs"], labels=labels)
    ours = cross_entropy(output.logits.flatten(0, 1)[batch["positions"]], batch["targets"])
    torch.testing.assert_close(ours, output.loss)


def test_answer_tokens_do_not_depend_on_the_prompt(smoke_processor: Any) -> None:
    batch = collator(smoke_processor, "plain")([Sample("a", "t", (), (("user", "re"), ("assistant", "red")))])
    tokenizer = smoke_processor.tokenizer
    assert batch["targets"].tolist() == [*tokenizer("red", add_special_tokens=False).input_ids, tokenizer.eos_token_id]


def test_empty_answer_is_only_the_end(smoke_processor: Any) -> None:
    batch = collator(smoke_processor, "vicuna")([Sample("a", "t", (), (("user", "?"), ("assistant", " ")))])
    assert batch["targets"].tolist() == [smoke_processor.tokenizer.eos_token_id]


# Images


def test_batches_with_some_and_without_any_image(smoke_processor: Any, model: Any, samples: list[Sample]) -> None:
    mixed = collator(smoke_processor)(samples)
    assert mixed["inputs"]["pixel_values"].shape == (3, 3, 30, 30)
    assert mixed["inputs"]["pixel_values"].dtype == torch.float32
    text = collator(smoke_processor)(samples[1:2])
    assert set(text["inputs"]) == {"input_ids", "attention_mask"}
    with torch.no_grad():
        both = [model(**batch["inputs"]).logits for batch in (mixed, text)]
    torch.testing.assert_close(both[0][1, : both[1].shape[1]], both[1][0], atol=1e-5, rtol=1e-4)


def test_other_sequence_like_keys_grow_with_the_answers(smoke_processor: Any, samples: list[Sample]) -> None:
    processor = copy.copy(smoke_processor)
    processor.return_mm_token_type_ids = True
    inputs = collator(processor)(samples)["inputs"]
    assert inputs["mm_token_type_ids"].shape == inputs["input_ids"].shape
    assert torch.equal(inputs["mm_token_type_ids"] == 1, inputs["input_ids"] == processor.image_token_id)


def test_image_token_in_the_text_is_an_error(smoke_processor: Any, picture: str) -> None:
    turns: Turns = (("user", "What?"), ("assistant", "an <image>"))
    with pytest.raises(ValueError, match=r"id 'a'.*2 image token\(s\) '<image>' for 1"):
        collator(smoke_processor)([Sample("a", "t", (picture,), turns)])


def test_a_broken_image_names_the_row(smoke_processor: Any, tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("no")
    with pytest.raises(ValueError, match=r"f\.json, row 5 \(id 'a'.*x\.png cannot be read"):
        collator(smoke_processor)([Sample("a", "t", (str(tmp_path / "x.png"),), ONE, source="f.json", row=4)])


# Length


def test_long_rows_lose_the_end_of_their_text(smoke_processor: Any, model: Any, samples: list[Sample]) -> None:
    whole = collator(smoke_processor)(samples)
    lengths = whole["inputs"]["attention_mask"].sum(1).tolist()
    batch = collator(smoke_processor, max_length=lengths[1] - 2)(samples)
    assert (batch["shortened"], batch["dropped"]) == (1, 1)
    assert batch["cut"] == [None, "shortened", "dropped"]
    assert batch["length"] == lengths
    kept = whole["targets"][whole["rows"] == 1][:-2]
    assert torch.equal(batch["targets"][batch["rows"] == 1], kept)
    assert set(batch["rows"].tolist()) == {0, 1}
    assert model(**batch["inputs"]).logits.isfinite().all()


@pytest.mark.parametrize("max_length", [1, 5, 20])
def test_rows_without_any_answer_left(smoke_processor: Any, model: Any, samples: list[Sample], max_length: int) -> None:
    images = [samples[0], samples[2]]
    batch = collator(smoke_processor, max_length=max_length)(images)
    assert (batch["shortened"], batch["dropped"]) == (0, 2)
    for key in ("targets", "positions", "rows"):
        assert (batch[key].shape, batch[key].dtype) == ((0,), torch.long)
    ids = batch["inputs"]["input_ids"]
    assert torch.equal((ids == smoke_processor.image_token_id).sum(1), torch.tensor([1, 2]) * IMAGE_TOKENS)
    assert model(**batch["inputs"]).logits.shape[:2] == ids.shape


# Evaluation


@pytest.mark.parametrize("template", TEMPLATES)
def test_evaluation_prompt_is_the_training_prompt(smoke_processor: Any, samples: list[Sample], template: Any) -> None:
    train = collator(smoke_processor, template)(samples)
    asked = [
        Sample(s.id, s.task, s.images, s.turns[:-1], reference=s.turns[-1][1], extra={"n": 1}, row=7) for s in samples
    ]
    batch = EvalCollator(smoke_processor, PromptConfig(template=template))(asked)
    mask = batch["inputs"]["attention_mask"]
    assert mask[:, -1].all(), "left padding"
    for row in range(3):
        prompt = batch["inputs"]["input_ids"][row][mask[row].bool()]
        trained = train["inputs"]["input_ids"][row]
        assert torch.equal(prompt, trained[: len(prompt)])
        answer = train["targets"][train["rows"] == row]
        assert trained[len(prompt)] in answer
    assert batch["reference"] == ["red", "green", "two"]
    assert batch["prompt"] == ["Which colour is this?", "and now?", "How many dots are there?"]
    assert (batch["index"], batch["extra"]) == ([7] * 3, [{"n": 1}] * 3)
    assert (batch["task"], batch["id"]) == (["colours", "chat", "counts"], ["a", "b", "c"])
    assert torch.equal(batch["inputs"]["pixel_values"], train["inputs"]["pixel_values"])


@pytest.mark.parametrize(
    ("suffix", "asked"),
    [
        ("Answer with one word.", "Which colour is this?\nAnswer with one word.\n"),
        (" Answer with one word.", "Which colour is this? Answer with one word.\n"),
        ("colour is this?", "Which colour is this?\n"),  # the question has it already
        (" this?", "Which colour is this?\n"),
        ("", "Which colour is this?\n"),
    ],
)
def test_suffix_follows_the_last_question(smoke_processor: Any, picture: str, suffix: str, asked: str) -> None:
    sample = Sample("a", "t", (picture,), ONE[:1], reference="red")
    batch = EvalCollator(smoke_processor, PromptConfig(template="plain"), suffix=suffix)([sample])
    text = smoke_processor.tokenizer.decode(batch["inputs"]["input_ids"][0])
    assert text.endswith(f"<image>\n{asked}")
    assert batch["prompt"] == ["Which colour is this?"]


def test_generation_does_not_depend_on_the_batch(smoke_processor: Any, model: Any, samples: list[Sample]) -> None:
    asked = [Sample(s.id, s.task, s.images, s.turns[:-1]) for s in samples]
    collate = EvalCollator(smoke_processor, PromptConfig())

    def answers(batch: list[Sample]) -> list[list[int]]:
        inputs = collate(batch)["inputs"]
        length = inputs["input_ids"].shape[1]
        return model.generate(**inputs, do_sample=False, max_new_tokens=3)[:, length:].tolist()

    assert answers(asked) == [answers([sample])[0] for sample in asked]


# Templates


def test_vicuna_text(smoke_processor: Any) -> None:
    pieces = build_template(PromptConfig(template="vicuna"), smoke_processor).pieces(TWO, 1)
    assert [piece.prompt for piece in pieces] == [
        f"{VICUNA_SYSTEM} USER: <image>\nHi ASSISTANT:",
        "USER: and now? ASSISTANT:",
    ]


def test_chat_text_is_the_processors_own(smoke_processor: Any) -> None:
    template = build_template(PromptConfig(), smoke_processor)
    messages = [
        {"role": role, "content": [*([{"type": "image"}] if n == 0 else []), {"type": "text", "text": text}]}
        for n, (role, text) in enumerate(TWO)
    ]
    whole = smoke_processor.apply_chat_template(messages, tokenize=False)
    joined = "".join(f"{piece.prompt}{piece.answer}{template.end}" for piece in template.pieces(TWO, 1))
    assert whole == joined + "\n"


LLAVA_STYLE = (
    "{% for m in messages %}{{ m['role'] | upper }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ c['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def test_chat_template_without_end_token(smoke_processor: Any) -> None:
    processor = copy.copy(smoke_processor)
    processor.chat_template = LLAVA_STYLE
    template = build_template(PromptConfig(), processor)
    assert (template.lead, template.end) == (" ", processor.tokenizer.eos_token)
    assert [piece.prompt for piece in template.pieces(TWO, 1)] == [
        "USER: <image>\nHi ASSISTANT:",
        " USER: and now? ASSISTANT:",
    ]


@pytest.mark.parametrize(
    ("chat_template", "said"),
    [
        (None, "no chat template"),
        ("{% for m in messages %}x{% endfor %}{% if add_generation_prompt %}<think>{% endif %}", "right after"),
    ],
)
def test_unusable_chat_templates(smoke_processor: Any, chat_template: str | None, said: str) -> None:
    processor = copy.copy(smoke_processor)
    processor.chat_template = chat_template
    with pytest.raises(ValueError, match=f"{said}(.|\n)*vicuna or plain"):
        collator(processor)


def test_chat_template_that_rewrites_earlier_turns(smoke_processor: Any) -> None:
    processor = copy.copy(smoke_processor)
    processor.chat_template = (  # forgets all answers but the last, as templates of thinking models do
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'user' or loop.last %}{{ m['content'][0]['text'] }}"
        "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    assert collator(processor)([Sample("a", "t", (), ONE)])["targets"].numel() > 0
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        collator(processor)([Sample("a", "t", (), TWO)])


def test_tokenizers_that_add_a_space_get_no_second_one(smoke_processor: Any) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "<image>", "\u2581", "\u2581red", "\u2581What?", "\u2581ASSISTANT:", "\u2581USER:"]
    bare = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>"))
    bare.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    bare.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bare,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    processor = LlavaProcessor(smoke_processor.image_processor, tokenizer, patch_size=10)
    batch = collator(processor, "vicuna")([Sample("a", "t", (), (("user", "What?"), ("assistant", "red")))])
    assert tokenizer.convert_ids_to_tokens(batch["targets"].tolist()) == ["\u2581red", "</s>"]


def test_tokenizer_without_padding_token(smoke_processor: Any) -> None:
    processor = copy.deepcopy(smoke_processor)
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="no pad_token"):
        collator(processor)
