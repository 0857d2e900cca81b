"""Frozen embeddings of a sample's image and question, by which a task selector knows the task (see `selector`).

Shapes: B samples, d_img and d_txt the widths of the embeddings.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from mcit_lightning.data.collate import SampleReader
from mcit_lightning.features import feature_width
from mcit_lightning.loss import Batch, prompt_mask
from mcit_lightning.tiles import image_tokens, tile_owners
from mcit_lightning.towers import Towers


class Embeddings(NamedTuple):
    """Of a batch, in float32; a sample's own do not depend on the rest of the batch."""

    image: Tensor
    """[B, d_img], zero without an image, the mean over several."""
    has_image: Tensor
    """[B], 1 where the sample has an image."""
    text: Tensor
    """[B, d_txt]."""


class KeyEncoder(ABC):
    """What embeds images and questions. Not a module: it is frozen, and no part of a checkpoint."""

    reader: SampleReader | None = None
    """What the collators are to add to a batch for it."""

    @abstractmethod
    def widths(self, towers: Towers) -> tuple[int, int]:
        """(d_img, d_txt)."""

    @abstractmethod
    def embed(self, towers: Towers, batch: Batch) -> Embeddings:
        """The embeddings of a batch."""

    @abstractmethod
    def check(self, towers: Towers, batch: Batch) -> None:
        """Raise what `embed` would raise for a batch of this form, without computing anything."""


class TowerEncoder(KeyEncoder):
    """The model's own vision tower and input embeddings: no second model.

    The image embedding is the mean over the vision tower's tokens (and over all pictures or tiles of a sample), the text
    embedding the mean of the decoder's input embeddings over the prompt's text tokens.
    """

    def widths(self, towers: Towers) -> tuple[int, int]:
        """Hidden sizes of the two towers."""
        return feature_width(towers)

    @torch.no_grad()
    def embed(self, towers: Towers, batch: Batch) -> Embeddings:
        """The embeddings of a batch.

        Raises:
            ValueError: the vision tower gets pictures in a form that does not tell which sample they belong to.
        """
        inputs = batch["inputs"]
        ids: Tensor = inputs["input_ids"]
        text = mean_text(towers, batch)
        owners = self._owners(towers, batch)
        image = torch.zeros(len(ids), self.widths(towers)[0], device=ids.device)
        if len(owners):
            vision = towers.model.get_submodule(towers.vision)
            pixels = inputs["pixel_values"].to(next(vision.parameters()).dtype)
            image = mean_by_owner(vision(pixels).last_hidden_state.float().mean(1), owners, len(ids))
        has_image = torch.tensor([float(count > 0) for count in batch["num_images"]], device=ids.device)
        return Embeddings(image, has_image, text)

    def check(self, towers: Towers, batch: Batch) -> None:
        """See `embed`."""
        self._owners(towers, batch)

    def _owners(self, towers: Towers, batch: Batch) -> Tensor:
        try:
            return tile_owners(towers, batch)
        except ValueError as error:
            raise ValueError(
                f"strategy.key_encoder: is null, but the model's own vision tower cannot embed single images here ({error}). "
                "Name a CLIP checkpoint in strategy.key_encoder, or use strategy.selector: oracle"
            ) from error


@torch.no_grad()
def mean_text(towers: Towers, batch: Batch) -> Tensor:
    """[B, d_txt] in float32, the mean of the decoder's input embeddings over the prompt's text tokens."""
    is_text = (prompt_mask(batch) * ~image_tokens(towers, batch)).float().unsqueeze(-1)
    embeddings = towers.model.get_input_embeddings()(batch["inputs"]["input_ids"]).float()
    return (embeddings * is_text).sum(1) / is_text.sum(1).clamp(min=1)


def mean_by_owner(values: Tensor, owners: Tensor, size: int) -> Tensor:
    """[size, d], the mean of the rows of `values` [N, d] that belong to each owner; zero for one without any.

    Args:
        owners: [N], from 0 to `size` - 1.
    """
    total = values.new_zeros(size, values.shape[1]).index_add(0, owners, values)
    count = values.new_zeros(size).index_add(0, owners, torch.ones_like(owners, dtype=values.dtype))
    return total / count.clamp(min=1).unsqueeze(1)
