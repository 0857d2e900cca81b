"""Load a LLaVA-style model and its processor from a local folder or the hub."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from mcit_lightning.config import BackboneConfig
from mcit_lightning.errors import first_line
from mcit_lightning.processors import read_processor
from mcit_lightning.quantization import quantization_arguments
from mcit_lightning.towers import Towers

logger = logging.getLogger(__name__)


@dataclass
class Backbone:
    """A frozen model, its processor, and where its towers are."""

    model: PreTrainedModel
    processor: ProcessorMixin
    towers: Towers


def load_processor(config: BackboneConfig) -> ProcessorMixin:
    """The processor alone; see `load_backbone`."""
    with _explained(config):
        return read_processor(config.id, config.image_processor, **_hub_arguments(config))


def load_backbone(
    config: BackboneConfig, *, precision: str = "32-true", device: torch.device | str = "cpu"
) -> Backbone:
    """Load model and processor; every parameter is frozen.

    Args:
        precision: Lightning's precision, which decides the data type of the base when `dtype` is `auto`.
        device: where a quantised base goes; any other is loaded into host memory, from where Lightning moves it.

    Raises:
        ValueError: nothing can be loaded under `id`, it is not a LLaVA-style model, or a package that it needs is missing.
    """
    processor = load_processor(config)
    arguments = _hub_arguments(config)
    if config.attention is not None:
        arguments["attn_implementation"] = config.attention
    with _explained(config):
        dtype = base_dtype(config, precision)
        if config.quantization is not None:
            arguments |= quantization_arguments(config, dtype, device, _hub_arguments(config))
        model = AutoModelForImageTextToText.from_pretrained(config.id, dtype=dtype, **arguments)
    return wrap(model, processor, config)


def wrap(model: PreTrainedModel, processor: ProcessorMixin, config: BackboneConfig) -> Backbone:
    """A backbone from a model that is already built (or that is on the meta device)."""
    text = model.config.get_text_config()
    if getattr(text, "final_logit_softcapping", None):
        raise ValueError(
            f"backbone.id: {config.id!r} caps its logits (final_logit_softcapping), which the answer-only loss leaves out; "
            "such models are not supported"
        )
    model.requires_grad_(False)
    if config.activation_checkpointing:
        _checkpoint_activations(model)
    tokenizer = processor.tokenizer
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return Backbone(model, processor, Towers.of(model, config.projector))


def base_dtype(config: BackboneConfig, precision: str) -> torch.dtype:
    """Data type of the frozen base: the configured one, or bfloat16 under bf16 autocast and float32 otherwise."""
    if config.dtype != "auto":
        dtype = getattr(torch, config.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    return torch.bfloat16 if precision.startswith("bf16") else torch.float32


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Non-reentrant, which works with frozen inputs and with DDP; transformers has renamed the method."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _hub_arguments(config: BackboneConfig) -> dict[str, Any]:
    return {"revision": config.revision or "main", "trust_remote_code": config.trust_remote_code}


class _explained:
    """Turn the many errors of loading into one that names the key and the remedy."""

    def __init__(self, config: BackboneConfig) -> None:
        self.config = config

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ImportError):
            raise ValueError(
                f"backbone.id: {self.config.id!r} needs a package that is not installed: {str(error).strip().splitlines()[0]}"
            ) from error
        if isinstance(error, Exception) and not isinstance(error, torch.OutOfMemoryError):
            # of a dozen kinds: a damaged file ends in any of the readers' own
            raise ValueError(
                f"backbone.id: cannot load {self.config.id!r} (revision {self.config.revision or 'main'}): "
                f"{first_line(error)}. "
                "Give a folder with a saved LLaVA-style model and its processor, or a hub name that this machine can reach."
            ) from error
