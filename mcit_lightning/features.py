"""Sequence features of a sample: what the pretrained model makes of its image and of its question, max-pooled over tokens.

D-MoLE (Ge et al., ICML 2025, Eq. 6-7): z = [max over vision tokens ; max over text tokens], from the frozen base. The text goes
through the language model alone, without the image, so a question that several samples of a batch ask is read once. Shapes: B
samples, d_v and d_l the widths of the towers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from mcit_lightning.loss import Batch, prompt_mask
from mcit_lightning.tiles import image_tokens, tile_owners
from mcit_lightning.towers import Towers

Tiles = Literal["all", "last"]
"""Which tiles of an image are pooled: all, or the last one, which is InternVL's thumbnail (the released code)."""


def feature_width(towers: Towers) -> tuple[int, int]:
    """(d_v, d_l)."""
    config = towers.model.config
    return config.vision_config.hidden_size, config.get_text_config().hidden_size


@torch.no_grad()
def sequence_features(towers: Towers, batch: Batch, *, tiles: Tiles = "all", masked: bool = True) -> Tensor:
    """[B, d_v + d_l] in float32; the vision part is NaN for a sample without an image, the text part for one without a question.

    Adapters are left out, and dropout is off, in training too. Padding does not take part, so a sample's features do not depend
    on the rest of the batch.

    Args:
        tiles: which tiles of an image are pooled.
        masked: False lets the padding behind the questions take part, as the released code does.

    Raises:
        ValueError: see `tile_owners`.
    """
    with towers.pretrained(), _evaluating(towers):
        return torch.cat([_vision(towers, batch, tiles), _text(towers, batch, masked)], dim=1)


def _vision(towers: Towers, batch: Batch, tiles: Tiles) -> Tensor:
    """[B, d_v], maximum over the tokens of all of a sample's pictures."""
    size, width = batch["inputs"]["input_ids"].shape[0], feature_width(towers)[0]
    owners = tile_owners(towers, batch)
    pooled = torch.full((size, width), -torch.inf, device=owners.device, dtype=torch.float32)
    if len(owners):
        tower = towers.model.get_submodule(towers.vision)
        pixels = batch["inputs"]["pixel_values"].to(next(tower.parameters()).dtype)
        hidden = tower(pixels).last_hidden_state.float().amax(1)
        if tiles == "last":
            last = torch.ones_like(owners, dtype=torch.bool)
            last[:-1] = owners[1:] != owners[:-1]
            hidden = hidden.masked_fill(~last.unsqueeze(1), -torch.inf)
        pooled = pooled.scatter_reduce(0, owners.unsqueeze(1).expand(-1, width), hidden, "amax")
    return pooled.masked_fill(pooled.isinf(), torch.nan)


def _text(towers: Towers, batch: Batch, masked: bool) -> Tensor:
    """[B, d_l], maximum over the tokens of the question: those of the prompt behind the last image token."""
    inputs = batch["inputs"]
    ids, image = inputs["input_ids"], image_tokens(towers, batch)
    behind = image.flip(1).cumsum(1).flip(1) == 0
    keep = prompt_mask(batch).bool() & behind
    order = torch.argsort((~keep).to(torch.uint8), dim=1, stable=True)  # questions to the left, in their order
    order = order[:, : max(1, int(keep.sum(1).max()))]
    mask = keep.gather(1, order)
    pad = towers.model.generation_config.pad_token_id if towers.model.generation_config is not None else 0
    question = ids.gather(1, order).masked_fill(~mask, pad or 0)
    asked, row = torch.unique(torch.stack([question, mask.long()], 1), dim=0, return_inverse=True)
    question, mask = asked[:, 0], asked[:, 1].bool()
    decoder = towers.model.get_submodule(towers.language)
    hidden = decoder(input_ids=question, attention_mask=mask.long(), use_cache=False).last_hidden_state.float()
    if masked:
        hidden = hidden.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    pooled = hidden.amax(1).masked_fill(~mask.any(1, keepdim=True), torch.nan)
    return pooled.index_select(0, row)


@contextmanager
def _evaluating(towers: Towers) -> Iterator[None]:
    """Both towers in evaluation mode; every module gets back the mode that it had."""
    training = [module for module in towers.model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
