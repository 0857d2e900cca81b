"""How much memory a device needs for training: an estimate from shapes alone.

Weights, gradients and optimizer state are exact counts. Activations are rough: without the attention matrix, which fused
attention does not keep, a transformer layer keeps 34 bytes per token and hidden unit in 16 bit (Korthikanti et al., MLSys 2023,
section 4.1); 38 to 43 were measured on SmolLM2-135M with LoRA on all linears, so 40 are taken. With activation checkpointing each
layer keeps its input, 2 bytes, and one layer at a time is recomputed. Samples are taken to be `data.max_length` long, so most
batches need less. Under FSDP2 a device holds its share of the decoder's layers, and two of them whole. Not in it: activations of
an adapted vision tower, logits of the answers, fragmentation, gradient probes, evaluation.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mcit_lightning.backbone import base_dtype
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.dry_run.forecast import Forecast
from mcit_lightning.engine import FSDP2
from mcit_lightning.quantization import saved_bytes
from mcit_lightning.sharding import decoder_layers
from mcit_lightning.towers import Towers

FLOAT32 = 4
ADAM = 8
LAYER, INPUT = 40, 2
"""Bytes per token and hidden unit that a whole layer keeps, and its input alone, in 16 bit."""


@dataclass(frozen=True)
class Memory:
    """Bytes on each device, in the stage that needs most.

    Args:
        base: the frozen model, and a trained projector in float32.
        stored: adapters and the strategy's own tensors.
        training: gradients, Adam's two moments, and with several devices DDP's buckets.
        activations: of one micro-batch; None where nothing trains or the decoder's shape has other names.
    """

    base: int
    stored: int
    training: int
    activations: int | None

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.stored + self.training + (self.activations or 0)


def estimate_memory(
    config: ExperimentConfig,
    base: int,
    projector: int,
    towers: Towers,
    forecast: Forecast,
    precision: str,
    devices: int,
) -> Memory:
    """Add up what training needs.

    Args:
        config: the experiment.
        base: parameters of the model without adapters.
        projector: of these, the ones of the projector that train.
        towers: the model, for the decoder's shape.
        forecast: what the strategy adds.
        precision: Lightning's precision.
        devices: processes that train side by side.
    """
    size = base_dtype(config.backbone, precision).itemsize
    trained = max((stage.trainable.high for stage in forecast.stages), default=0)
    trained += projector if forecast.stages else 0
    stored = max((stage.stored.high for stage in forecast.stages), default=0)
    each = FLOAT32 + ADAM + (FLOAT32 if devices > 1 else 0)
    activations = None
    if forecast.stages:
        sizes = [config.tasks[task].batch_size or config.data.batch_size for task in config.order]
        tokens = max(sizes) * config.data.max_length
        bytes_16 = _activations(towers.model.config.get_text_config(), tokens, config.backbone.activation_checkpointing)
        activations = bytes_16 if bytes_16 is None or "16" in precision else 2 * bytes_16
    frozen = (base - projector) * size - saved_bytes(config.backbone, towers, size)
    if config.trainer.get("strategy") == FSDP2:
        whole = {id(value) for layer in towers.adapters.values() for _, value in layer.adapter_parameters()}
        layers = [count(p for p in layer.parameters() if id(p) not in whole) for layer in decoder_layers(towers)]
        frozen -= max(0, (sum(layers) - sum(layers) // devices - 2 * max(layers, default=0)) * size)
    return Memory(frozen + projector * FLOAT32, stored * FLOAT32, trained * each, activations)


def count(tensors: Iterable[Tensor]) -> int:
    """How many numbers tensors hold."""
    return sum(tensor.numel() for tensor in tensors)


def projector_size(towers: Towers) -> int:
    """Parameters of the projector."""
    return sum(count(towers.model.get_submodule(path).parameters()) for path in towers.projector)


def _activations(decoder: Any, tokens: int, checkpointing: bool) -> int | None:
    """Bytes in 16 bit."""
    layers, hidden = getattr(decoder, "num_hidden_layers", None), getattr(decoder, "hidden_size", None)
    if not isinstance(layers, int) or not isinstance(hidden, int):
        return None
    return tokens * hidden * (layers * INPUT + LAYER if checkpointing else layers * LAYER)
