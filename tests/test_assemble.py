"""LLaVA-1.5 out of its three published parts, here tiny ones in the published formats."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from mcit_lightning.assemble import assemble, main, read_projector
from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import BackboneConfig, PromptConfig
from mcit_lightning.data.collate import TrainCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.loss import answer_loss

WIDTH, VISION = 32, 16


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vicuna` (a causal language model), `clip` (both towers, as openai publishes it) and `projector/mm_projector.bin`."""
    root = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    tokenizer = families.tokenizer([])
    tokenizer.pad_token = None
    tokenizer.save_pretrained(root / "vicuna")
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(text).save_pretrained(root / "vicuna")
    tower = {"hidden_size": VISION, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    clip = CLIPConfig(
        vision_config={**tower, "image_size": 28, "patch_size": 14}, text_config={**tower, "vocab_size": 50}
    )
    CLIPModel(clip).save_pretrained(root / "clip")
    size = {"height": 28, "width": 28}
    CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=size).save_pretrained(root / "clip")
    (root / "projector").mkdir()
    torch.save(projector(VISION, WIDTH), root / "projector/mm_projector.bin")
    return root


def projector(inside: int, out: int) -> dict[str, torch.Tensor]:
    """The file's keys as LLaVA saves them from `model.mm_projector`."""
    shapes = {"0.weight": (out, inside), "0.bias": (out,), "2.weight": (out, out), "2.bias": (out,)}
    return {f"model.mm_projector.{key}": torch.randn(shape) * 0.1 for key, shape in shapes.items()}


@pytest.fixture(scope="module")
def assembled(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("assembled") / "model"
    assemble(str(parts / "vicuna"), str(parts / "clip"), str(parts / "projector"), out)
    return out


def test_the_language_model_answers_as_before(parts: Path, assembled: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(assembled).eval()
    vicuna = LlamaForCausalLM.from_pretrained(parts / "vicuna").eval()
    ids = torch.tensor([[1, 5, 9, 20, 7]])
    with torch.no_grad():
        old, new = vicuna(ids).logits, model(input_ids=ids).logits
    torch.testing.assert_close(new[..., : old.shape[-1]], old)
    assert new.shape[-1] % 64 == 0 and new.shape[-1] >= old.shape[-1] + 2
    # a new token's logit is the mean of the old ones, so it is never the largest
    torch.testing.assert_close(new[..., old.shape[-1]], old.mean(-1), atol=1e-5, rtol=1e-4)


def test_images_go_through_clip_and_the_given_projector(parts: Path, assembled: Path) -> None:
    model = AutoModelForImageTextToText.from_pretrained(assembled).eval()
    clip = CLIPModel.from_pretrained(parts / "clip").eval()
    weights = torch.load(parts / "projector/mm_projector.bin", weights_only=True)
    pixels = torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        patches = clip.vision_model(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        first = patches @ weights["model.mm_projector.0.weight"].T + weights["model.mm_projector.0.bias"]
        wanted = torch.nn.functional.gelu(first) @ weights["model.mm_projector.2.weight"].T
        wanted = wanted + weights["model.mm_projector.2.bias"]
        found = model.get_image_features(pixels).pooler_output
    torch.testing.assert_close(torch.cat(list(found)).reshape(wanted.shape), wanted, atol=1e-5, rtol=1e-4)


def test_it_is_a_backbone(assembled: Path, tmp_path: Path) -> None:
    backbone = load_backbone(BackboneConfig(id=str(assembled)))
    assert backbone.processor.image_token_id == backbone.model.config.image_token_id
    assert backbone.processor.tokenizer.pad_token == "<pad>"
    Image.new("RGB", (40, 20), (200, 0, 0)).save(tmp_path / "a.png")
    collate = TrainCollator(backbone.processor, PromptConfig(template="vicuna", pad_to_square=True), max_length=500)
    batch = collate([Sample("a", "t", (str(tmp_path / "a.png"),), (("user", "Which one?"), ("assistant", "red")))])
    assert (batch["inputs"]["input_ids"] == backbone.processor.image_token_id).sum() == 4
    backbone.model.model.multi_modal_projector.requires_grad_(True)
    answer_loss(backbone.model, batch).loss.backward()
    assert backbone.model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_the_command(parts: Path, assembled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    arguments = ["--language", str(parts / "vicuna"), "--vision", str(parts / "clip"), "--projector"]
    file = str(parts / "projector/mm_projector.bin")
    assert main([*arguments, file, "--out", str(tmp_path / "model")]) == 0
    assert type(AutoProcessor.from_pretrained(tmp_path / "model")).__name__ == "LlavaProcessor"
    assert main([*arguments, file, "--out", str(assembled)]) == 2
    assert "is not empty" in caplog.text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"model.mm_projector.weight": torch.zeros(2, 2)}, "not those of LLaVA-1.5's two-layer projector"),
        (projector(VISION, 2 * WIDTH), r"linear_1.weight is \[64, 16\], but .* need \[32, 16\]"),
        (None, "cannot be read"),
    ],
)
def test_a_projector_that_does_not_fit(parts: Path, tmp_path: Path, content: Any, said: str) -> None:
    file = tmp_path / "mm_projector.bin"
    file.write_bytes(b"no") if content is None else torch.save(content, file)
    with pytest.raises(ValueError, match=said):
        assemble(str(parts / "vicuna"), str(parts / "clip"), str(file), tmp_path / "out")


def test_names_of_the_projector(parts: Path) -> None:
    names = {"linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias"}
    assert read_projector(str(parts / "projector")).keys() == names
