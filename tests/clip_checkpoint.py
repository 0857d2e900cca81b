"""A tiny CLIP checkpoint in the files in which OpenAI's are published."""

import json
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import CLIPConfig, CLIPModel

START, END = "<|startoftext|>", "<|endoftext|>"
POSITIONS = 77
WIDTH = 12


def write_clip(folder: Path, *, size: int = 28) -> Path:
    """Random weights; the vocabulary is the byte alphabet, so that a letter is a token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "co</w>", START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **sizes,
        "vocab_size": len(vocabulary),
        "max_position_embeddings": POSITIONS,
        "bos_token_id": vocabulary[START],
        "eos_token_id": vocabulary[END],
        "pad_token_id": vocabulary[END],
    }
    vision = {**sizes, "image_size": size, "patch_size": 14}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
        for name, parameter in model.named_parameters():
            if "embed" in name:
                torch.nn.init.normal_(parameter, std=1.0)  # so that what is embedded differs clearly
    model.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\nc o</w>\n")
    special = {"unk_token": END, "bos_token": START, "eos_token": END, "pad_token": END}
    about = {**special, "errors": "replace", "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    images = {
        "crop_size": size,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "size": size,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    return folder
