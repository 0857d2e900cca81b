"""Tiny checkpoints of the families that `experiments/_base` has presets for: their own model, processor and image classes,
random weights, a small vocabulary, and the chat templates' published form.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast

from mcit_lightning.processors import images_only

WORDS = (
    "What colour is this? Which one? red green blue user assistant User Assistant system You are a helpful assistant."
)
END, START, PAD = "<|im_end|>", "<|im_start|>", "<|endoftext|>"

_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ IMAGE }}{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
)


def chatml(image: str, system: str = "") -> str:
    """ChatML, in which InternVL and Qwen-VL differ by the sign for an image only."""
    return (
        system
        + "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
        + _PARTS.replace("IMAGE", f"'{image}'")
        + "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )


# An answer that was given follows "assistant \n", one that is asked for "assistant\n".
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ '\\n' + part['text'] }}{% endfor %}"
    "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SMOLVLM = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    + _PARTS.replace("IMAGE", "'<image>'")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
QWEN_SYSTEM = "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}"


def tokenizer(special: Sequence[str], **named: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE over a few words.

    Args:
        special: further special tokens.
        named: special tokens that processors look up by an attribute of the tokenizer.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=[PAD, START, END, *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([WORDS] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=START, eos_token=END, pad_token=PAD, extra_special_tokens=named
    )


def build(family: str, folder: Path) -> Path:
    """Write a tiny checkpoint of `family` to `folder`, as `save_pretrained` does."""
    processor, vision, text, options = FAMILIES[family]()
    tokens = processor.tokenizer
    sizes = {
        "vocab_size": len(tokens),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        **text,
    }
    config = AutoConfig.for_model(family, vision_config=vision, text_config=sizes, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


Parts = tuple[Any, dict[str, Any], dict[str, Any], dict[str, Any]]
"""Processor, vision configuration, changes to the text configuration, other arguments of the configuration."""


def _clip(size: int = 28) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": size,
        "patch_size": 14,
    }


def _images(name: str, **options: Any) -> Any:
    return getattr(transformers, f"{name}Pil")(**options)


def _llava() -> Parts:
    tokens = tokenizer(["<image>"], image_token="<image>")
    images = _images("CLIPImageProcessor", size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = images_only("LlavaProcessor")(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    return processor, _clip(), {"model_type": "llama"}, {"image_token_index": tokens.image_token_id}


def _llava_next() -> Parts:
    tokens = tokenizer(["<image>"], image_token="<image>")
    grid = [[28, 56], [56, 28], [56, 56]]
    images = _images(
        "LlavaNextImageProcessor",
        size={"shortest_edge": 28},
        crop_size={"height": 28, "width": 28},
        image_grid_pinpoints=grid,
    )
    processor = images_only("LlavaNextProcessor")(
        images, tokens, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )
    options = {"image_token_index": tokens.image_token_id, "image_grid_pinpoints": grid}
    return processor, _clip(), {"model_type": "llama"}, options


def _llava_onevision() -> Parts:
    tokens = tokenizer(["<image>", "<video>"], image_token="<image>", video_token="<video>")
    grid = [[28, 56], [56, 28], [56, 56]]
    images = _images("LlavaOnevisionImageProcessor", size={"height": 28, "width": 28}, image_grid_pinpoints=grid)
    processor = images_only("LlavaOnevisionProcessor")(
        images,
        tokens,
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=ONEVISION,
    )
    options = {
        "image_token_index": tokens.image_token_id,
        "video_token_index": tokens.video_token_id,
        "image_grid_pinpoints": grid,
        "vision_feature_select_strategy": "full",
        "vision_feature_layer": -1,
    }
    return processor, {**_clip(), "model_type": "siglip_vision_model"}, {"model_type": "qwen2"}, options


def _internvl() -> Parts:
    tokens = tokenizer(
        ["<IMG_CONTEXT>", "<img>", "</img>", "<video>"],
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    images = _images(
        "GotOcr2ImageProcessor",
        size={"height": 28, "width": 28},
        crop_to_patches=True,
        min_patches=1,
        max_patches=4,
    )
    processor = images_only("InternVLProcessor")(
        images, tokens, image_seq_length=4, chat_template=chatml("<IMG_CONTEXT>\\n")
    )
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": [28, 28],
        "patch_size": [7, 7],
    }
    return processor, vision, {"model_type": "qwen2"}, {"image_token_id": tokens.context_image_token_id}


def _small_idefics(name: str, image_class: str) -> Callable[[], Parts]:
    def parts() -> Parts:
        places = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
        tokens = tokenizer(["<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *places])
        images = _images(image_class, size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
        video = {"video_processor": None} if name == "SmolVLMProcessor" else {}
        processor = images_only(name)(images, tokens, image_seq_len=4, chat_template=SMOLVLM, **video)
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 7,
        }
        options = {"image_token_id": processor.image_token_id, "scale_factor": 2, "pad_token_id": tokens.pad_token_id}
        return processor, vision, {"model_type": "llama"}, options

    return parts


def _qwen(name: str, patch: int, vision: dict[str, Any], text: dict[str, Any]) -> Callable[[], Parts]:
    def parts() -> Parts:
        marks = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
        tokens = tokenizer(marks)
        area = (2 * patch) ** 2
        images = _images("Qwen2VLImageProcessor", patch_size=patch, min_pixels=area, max_pixels=6 * area)
        image = "<|vision_start|><|image_pad|><|vision_end|>"
        system = "" if patch == 16 else QWEN_SYSTEM  # Qwen3-VL has no default system prompt
        processor = images_only(name)(images, tokens, chat_template=chatml(image, system))
        ids = dict(zip(("start", "end", "image", "video"), tokens.convert_tokens_to_ids(marks), strict=True))
        options = {
            "vision_start_token_id": ids["start"],
            "vision_end_token_id": ids["end"],
            "image_token_id": ids["image"],
            "video_token_id": ids["video"],
        }
        return processor, {"patch_size": patch, **vision}, text, options

    return parts


_QWEN_TEXT = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}

FAMILIES: dict[str, Callable[[], Parts]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "internvl": _internvl,
    "idefics3": _small_idefics("Idefics3Processor", "Idefics3ImageProcessor"),
    "smolvlm": _small_idefics("SmolVLMProcessor", "SmolVLMImageProcessor"),
    "qwen2_vl": _qwen(
        "Qwen2VLProcessor", 14, {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2}, _QWEN_TEXT
    ),
    "qwen2_5_vl": _qwen(
        "Qwen2_5_VLProcessor",
        14,
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2,
         "fullatt_block_indexes": [1], "window_size": 56},
        _QWEN_TEXT,
    ),
    "qwen3_vl": _qwen(
        "Qwen3VLProcessor",
        16,
        {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 32, "num_heads": 2,
         "num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
        {**_QWEN_TEXT, "head_dim": 8},
    ),
}  # fmt: skip
