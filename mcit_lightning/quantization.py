"""4-bit and 8-bit bases: bitsandbytes through transformers, for the decoder's linears.

Vision tower, projector, embeddings and output head stay in the base's own type: they are small, and routers read the tower.
Adapters and routers are float32 parameters beside a quantised linear, as beside any other (QLoRA, Dettmers et al., NeurIPS 2023).
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from mcit_lightning.config import BackboneConfig, ExperimentConfig
from mcit_lightning.engine import FSDP2
from mcit_lightning.strategies import ContinualStrategy
from mcit_lightning.towers import Towers

PACKAGES = ("bitsandbytes", "accelerate")
BYTES = {"4bit": 0.5 + 4 / 64, "8bit": 1.0}
"""Of a weight: nf4 has a float32 factor for each block of 64."""


def check_quantization(config: ExperimentConfig, strategy: ContinualStrategy) -> None:
    """Refuse a quantised base where it cannot work.

    Raises:
        ValueError: the strategy or the engine needs whole weights, there is no CUDA device, or a package is missing.
    """
    kind = config.backbone.quantization
    if kind is None:
        return
    key = f"backbone.quantization: {kind!r} is refused"
    if strategy.needs_base_gradients:
        raise ValueError(
            f"{key}: strategy {config.strategy['name']!r} takes gradients of the base weights, which a quantised base does not "
            "have. Use a base in bfloat16, or for dmole strategy.allocation=random strategy.curriculum=false"
        )
    if config.trainer.get("strategy") == FSDP2:
        raise ValueError(f"{key}: fsdp2 shards weights of one floating-point type; use ddp, or no quantization")
    if config.dry_run:
        return
    if config.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available():
        raise ValueError(f"{key}: it needs a CUDA device, and this run has none; leave the key out")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"{key}: {' and '.join(missing)} not installed; pip install bitsandbytes accelerate, or the extra 'quantized'"
        )


def quantization_arguments(
    config: BackboneConfig, dtype: torch.dtype, device: torch.device | str, hub: dict[str, Any]
) -> dict[str, Any]:
    """Arguments of `from_pretrained` that quantise the decoder's linears while they are loaded, straight onto the device.

    Args:
        config: what is loaded; `quantization` is set.
        dtype: of the weights that are not quantised, and of the products.
        device: this process's own.
        hub: revision and trust, as for every loading function.
    """
    with torch.device("meta"):
        skeleton = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(config.id, **hub), trust_remote_code=config.trust_remote_code
        )
    towers = Towers.of(skeleton, config.projector)
    whole = [
        path
        for path, module in skeleton.named_modules()
        if isinstance(module, nn.Linear) and towers.tower_of(path) != "language"
    ]
    four = config.quantization == "4bit"
    quantization = BitsAndBytesConfig(
        load_in_4bit=four,
        load_in_8bit=not four,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=whole,  # of both kinds
    )
    return {"quantization_config": quantization, "device_map": {"": device}}


def saved_bytes(config: BackboneConfig, towers: Towers, size: int) -> int:
    """How much smaller quantization makes the base, in bytes; 0 without it.

    Args:
        size: bytes of a weight that is not quantised.
    """
    if config.quantization is None:
        return 0
    weights = sum(module.weight.numel() for _, module in towers.linears("language"))
    return int(weights * (size - BYTES[config.quantization]))
