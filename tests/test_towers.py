"""Finding the towers of LLaVA-style families, selecting targets, and putting adapters in."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.towers import Towers, find_targets


def tiny_llava(device: str = "cpu") -> LlavaForConditionalGeneration:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=20, patch_size=10
    )
    text = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    with torch.device(device):
        return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3))


def family(name: str) -> PreTrainedModel:
    """The family's model at its default size, on the meta device."""
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(AutoConfig.for_model(name))


@pytest.mark.parametrize(
    ("name", "projector"),
    [
        ("llava", ("model.multi_modal_projector",)),
        ("internvl", ("model.multi_modal_projector",)),
        ("smolvlm", ("model.connector",)),
        ("qwen2_vl", ("model.visual.merger",)),
    ],
)
def test_towers_of_the_families(name: str, projector: tuple[str, ...]) -> None:
    towers = Towers.of(family(name))
    assert towers.projector == projector
    language = {path.rpartition(".")[2] for path, _ in towers.linears("language")}
    assert language == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    vision = [path for path, _ in towers.linears("vision")]
    assert vision and not any(path.startswith(projector[0]) for path in vision)
    assert towers.tower_of(f"{projector[0]}.x") == "projector"
    assert towers.tower_of("lm_head") is None


def test_targets_are_selected_by_suffix_in_model_order() -> None:
    towers = Towers.of(tiny_llava("meta"))
    selected = find_targets(towers, {"language": ["v_proj", "q_proj"], "vision": ["mlp.fc1"]})
    assert len(selected) == 2 * 3 + 2
    assert list(selected)[:2] == [f"model.language_model.layers.0.self_attn.{name}_proj" for name in "qv"]
    assert len(find_targets(towers, {"language": ["all-linear"]})) == 7 * 3
    assert len(find_targets(towers, {"vision": ["all-linear"]})) == 6 * 2


@pytest.mark.parametrize(
    ("targets", "parts"),
    [
        ({"language": ["q_porj"]}, ["strategy.targets.language", "'q_porj'", "'q_proj'"]),
        ({"vision": ["o_proj"]}, ["strategy.targets.vision", "'o_proj'", "'out_proj'"]),
        ({"langauge": ["q_proj"]}, ["'langauge'", "'language'"]),
        ({"language": ["proj"]}, ["matches no linear"]),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(targets: dict[str, list[str]], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        find_targets(Towers.of(tiny_llava("meta")), targets)
    assert all(part in str(error.value) for part in parts), str(error.value)


def test_a_wrong_projector_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"backbone\.projector: no module 'model.projector'"):
        Towers.of(tiny_llava("meta"), projector="model.projector")


def test_attach_prints_a_plan_and_detach_gives_the_model_back() -> None:
    model = tiny_llava()
    inputs = {"input_ids": torch.tensor([[1, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    keys, logits = set(model.state_dict()), model(**inputs).logits
    towers = Towers.of(model)
    for path in find_targets(towers, {"language": ["q_proj", "down_proj"], "vision": ["q_proj"]}):
        towers.attach(path, scale=2.0).add_branch("lora", 4, seed=0, path=path)
    assert towers.injection_plan() == [
        ("language", "q_proj", 3, 1, 3 * 4 * (16 + 16)),
        ("language", "down_proj", 3, 1, 3 * 4 * (32 + 16)),
        ("vision", "q_proj", 2, 1, 2 * 4 * (16 + 16)),
    ]
    assert "8 modules" in towers.describe() and f"{3 * 128 + 3 * 192 + 2 * 128:,} parameters" in towers.describe()
    assert torch.equal(model(**inputs).logits, logits)
    # adapted linears are found again under the same paths, for strategies that add branches later
    assert len(find_targets(towers, {"language": ["all-linear"]})) == 21
    path = "model.language_model.layers.0.self_attn.q_proj"
    assert towers.attach(path, scale=2.0) is model.get_submodule(path) and isinstance(
        model.get_submodule(path), AdapterLinear
    )
    towers.detach_all()
    assert set(model.state_dict()) == keys and not towers.adapters


def test_adapters_on_the_meta_device_have_the_published_lora_size() -> None:
    """LLaVA-1.5-7B, rank 128 on all seven linears of 32 layers: 145,752,064 in A and 174,063,616 in B."""
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(text_config=text))
    towers = Towers.of(model)
    for path in find_targets(towers, {"language": ["all-linear"]}):
        towers.attach(path, scale=2.0).add_branch("lora", 128, seed=0, path=path)
    assert sum(row[4] for row in towers.injection_plan()) == 145_752_064 + 174_063_616
