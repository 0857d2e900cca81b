"""Which sample a picture in the vision tower's batch belongs to."""

import torch
from torch import Tensor

from mcit_lightning.loss import Batch
from mcit_lightning.towers import Towers


def image_tokens(towers: Towers, batch: Batch) -> Tensor:
    """[B, L], true at the placeholder tokens that the image features replace."""
    ids: Tensor = batch["inputs"]["input_ids"]
    return ids == towers.model.config.image_token_id


def tile_owners(towers: Towers, batch: Batch) -> Tensor:
    """[N], the sample (batch row) of each of the N pictures that the vision tower gets, in ascending order.

    A picture is an image, or one of the tiles that an image is cut into (InternVL); every tile has the same number of
    tokens in the prompt, which tells how many belong to a sample. Empty for a batch without images.

    Raises:
        ValueError: the model packs patches of several images into one sequence, or pads images to the same number of tiles.
    """
    counts: list[int] = batch["num_images"]
    device = batch["inputs"]["input_ids"].device
    if not any(counts):
        return torch.empty(0, dtype=torch.long, device=device)
    pixels: Tensor = batch["inputs"]["pixel_values"]
    if pixels.dim() != 4:
        raise ValueError(
            f"strategy: {type(towers.model).__name__} gives its vision tower {pixels.dim()}-dimensional pixel values; the "
            "strategy needs one picture or tile per row (4 dimensions) to tell which sample it belongs to"
        )
    if pixels.shape[0] != sum(counts):
        tokens = image_tokens(towers, batch).sum(1).tolist()
        per_tile, rest = divmod(sum(tokens), pixels.shape[0])
        if rest or any(count % per_tile for count in tokens):
            raise ValueError(
                f"strategy: {pixels.shape[0]} tiles do not share {sum(tokens)} image tokens evenly, so it is unknown which "
                "sample they belong to"
            )
        counts = [count // per_tile for count in tokens]
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    return torch.tensor(owners, device=device)
