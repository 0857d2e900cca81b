"""Put a LLaVA-1.5 together from the three parts that its authors publish before instruction tuning.

`python -m mcit_lightning.assemble --language lmsys/vicuna-7b-v1.5 --vision openai/clip-vit-large-patch14-336
--projector liuhaotian/llava-v1.5-mlp2x-336px-pretrain-vicuna-7b-v1.5 --out models/vicuna-7b-v1.5-mlp2x`

The result is a folder that `backbone.id` may name: the starting point of CoIN (Chen et al., NeurIPS 2024) and BranchLoRA (Zhang
et al., ACL 2025), which has seen none of their tasks. Vocabulary and embeddings are laid out as in llava-hf/llava-1.5-7b-hf.
"""

import argparse
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch import Tensor, nn
from transformers import (
    AddedToken,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from mcit_lightning.evaluation.files import check_new_folder

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
PROJECTOR_KEYS = {
    "0.weight": "linear_1.weight",
    "0.bias": "linear_1.bias",
    "2.weight": "linear_2.weight",
    "2.bias": "linear_2.bias",
}
"""LLaVA's names in `nn.Sequential(Linear, GELU, Linear)`, after `mm_projector.`, to those of transformers."""
IMAGE_TOKEN, PAD_TOKEN = "<image>", "<pad>"
MULTIPLE = 64
"""The vocabulary is filled up to a multiple of this, as in the converted checkpoints."""
VISION_LAYER = -2
"""Hidden state of the vision tower that the projector reads; its class token is left out."""


def assemble(language: str, vision: str, projector: str, out: Path) -> None:
    """Write the assembled model and its processor to `out`.

    Args:
        language: folder or hub name of the language model (Vicuna v1.5).
        vision: folder or hub name of the CLIP model.
        projector: `mm_projector.bin`, or the folder or hub name that holds it.
        out: a folder that does not exist yet, or is empty.

    Raises:
        ValueError: `out` is in use, a part cannot be loaded, or the parts do not fit together.
    """
    check_new_folder(out)
    weights = read_projector(projector)
    text = _load(AutoModelForCausalLM, language, "--language", dtype="auto")
    tower = _load(CLIPVisionModel, vision, "--vision", dtype="auto")
    model = join(text, tower, weights)
    tokenizer = _load(AutoTokenizer, language, "--language")
    tokenizer.add_tokens(AddedToken(IMAGE_TOKEN, special=True, normalized=False), special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    grow_vocabulary(model, tokenizer)
    processor = LlavaProcessor(
        _load(AutoImageProcessor, vision, "--vision"),
        tokenizer,
        patch_size=tower.config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" then drops
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    logger.info("wrote %s: %s parameters", out, f"{sum(p.numel() for p in model.parameters()):,}")


def read_projector(source: str) -> dict[str, Tensor]:
    """The projector's weights under transformers' names.

    Args:
        source: `mm_projector.bin`, or the folder or hub name that holds it.

    Raises:
        ValueError: there is no such file, or it holds other keys than those of a two-layer projector.
    """
    path = Path(source)
    if path.is_dir():
        path = path / PROJECTOR_FILE
    try:
        if not path.is_file():
            path = Path(hf_hub_download(source, PROJECTOR_FILE))
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the hub's errors and torch's are of a dozen kinds
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"--projector: {source!r} cannot be read: {first[0]}. Give {PROJECTOR_FILE}, a folder with it, or a hub name."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"--projector: {path} holds no weights by name; give LLaVA's {PROJECTOR_FILE}")
    found = {str(key).rpartition("mm_projector.")[2]: value for key, value in content.items()}
    if found.keys() != PROJECTOR_KEYS.keys():
        raise ValueError(
            f"--projector: {path} holds the keys {sorted(content)}, not those of LLaVA-1.5's two-layer projector "
            f"({', '.join(f'mm_projector.{key}' for key in PROJECTOR_KEYS)}). Give LLaVA-1.5's file"
        )
    return {PROJECTOR_KEYS[key]: value for key, value in found.items()}


def join(text: Any, tower: Any, projector: dict[str, Tensor]) -> LlavaForConditionalGeneration:
    """One model of the three parts. The parts' weights are used, not copied.

    Args:
        text: the language model with its output layer.
        tower: the vision tower.
        projector: its weights, under transformers' names.

    Raises:
        ValueError: the projector's widths are not those of tower and language model.
    """
    config = LlavaConfig(
        vision_config=tower.config,
        text_config=text.config,
        image_token_index=text.config.vocab_size,
        vision_feature_layer=VISION_LAYER,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    for name, parameter in model.model.multi_modal_projector.named_parameters():
        if projector[name].shape != parameter.shape:
            raise ValueError(
                f"--projector: {name} is {list(projector[name].shape)}, but this vision tower and language model need "
                f"{list(parameter.shape)}. The projector belongs to another pair."
            )
    weights = {name: value.to(text.dtype) for name, value in projector.items()}
    model.model.multi_modal_projector.load_state_dict(weights, assign=True)
    model.model.vision_tower = tower.to(text.dtype)
    model.model.language_model = text.base_model
    model.lm_head = text.get_output_embeddings()
    model.generation_config = text.generation_config
    return model.eval()


def grow_vocabulary(model: LlavaForConditionalGeneration, tokenizer: Any) -> None:
    """Room for the tokens that were added, filled up to a multiple of `MULTIPLE`.

    The new rows are the mean of the old ones: no input reads them, and as outputs they are never likelier than the tokens that
    the model knows.
    """
    embeddings = model.get_input_embeddings()
    assert isinstance(embeddings, nn.Embedding)
    old = embeddings.num_embeddings
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):
            assert isinstance(module, nn.Embedding | nn.Linear)
            module.weight[old:] = module.weight[:old].float().mean(0).to(module.weight.dtype)
    model.config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id


def _load(cls: Any, name: str, option: str, **arguments: Any) -> Any:
    try:
        return cls.from_pretrained(name, **arguments)
    except (OSError, ValueError, KeyError, ImportError) as error:
        first = str(error).strip().splitlines() or [type(error).__name__]
        # Vicuna's tokenizer is a SentencePiece file; transformers then asks for another package
        hint = " If its tokenizer is a SentencePiece file: pip install sentencepiece" if cls is AutoTokenizer else ""
        raise ValueError(f"{option}: cannot load {name!r} as {cls.__name__}: {first[0]}{hint}") from error


def main(arguments: list[str] | None = None) -> int:
    """The command line; exit status 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m mcit_lightning.assemble", description=__doc__)
    parser.add_argument("--language", required=True, help="folder or hub name of the language model")
    parser.add_argument("--vision", required=True, help="folder or hub name of the CLIP model")
    parser.add_argument("--projector", required=True, help=f"{PROJECTOR_FILE}, or the folder or hub name with it")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    try:
        assemble(options.language, options.vision, options.projector, options.out)
    except ValueError as error:
        logger.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
