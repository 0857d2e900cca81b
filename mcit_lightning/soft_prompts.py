"""Learned vectors in the decoder's input ("soft prompts"), other ones for every sample of a batch.

They stand behind a row's first token. `extend` gives every row as many placeholder tokens there, so positions, masks and caches
are what the model makes of longer rows; `placed` puts the vectors where the model has looked up the placeholders' embeddings.

Shapes: B samples, L tokens, P vectors for each sample, d the decoder's width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mcit_lightning.loss import Batch
from mcit_lightning.tiles import image_tokens
from mcit_lightning.towers import Towers


@dataclass(frozen=True)
class SoftPrompts:
    """The vectors of a batch and their places.

    Args:
        vectors: [B, P, d].
        before: [B], how many columns of a row are left of the vectors: padding, and the first token.
        placeholder: token id whose embedding is looked up in vain.
    """

    vectors: Tensor
    before: Tensor
    placeholder: int

    @classmethod
    def behind_first_token(cls, towers: Towers, batch: Batch, vectors: Tensor) -> "SoftPrompts":
        """Vectors behind the first real token of every row (before it, if it is part of a picture)."""
        first = batch["inputs"]["attention_mask"].argmax(1)
        starts_with_text = ~image_tokens(towers, batch).gather(1, first.unsqueeze(1)).squeeze(1)
        generation = towers.model.generation_config
        padding = None if generation is None else generation.pad_token_id
        placeholder = 0 if padding is None else int(padding)
        assert placeholder != towers.model.config.image_token_id
        return cls(vectors, first + starts_with_text, placeholder)

    def extend(self, batch: Batch) -> Batch:
        """The batch with room for the vectors: P columns more in all that the model takes per token, `positions` moved along.

        Padding stays where it was. All other entries are those of `batch`, which is not changed.
        """
        inputs: dict[str, Any] = batch["inputs"]
        ids: Tensor = inputs["input_ids"]
        fill = dict.fromkeys(inputs, 0) | {"input_ids": self.placeholder, "attention_mask": 1}
        per_token = [key for key, value in inputs.items() if value.shape == ids.shape and not value.is_floating_point()]
        longer = {**batch, "inputs": inputs | {key: self._widen(inputs[key], fill[key]) for key in per_token}}
        if "positions" in batch:  # of row b and column l: b L + l, where l is never left of the first token
            longer["positions"] = batch["positions"] + (batch["rows"] + 1) * self.vectors.shape[1]
        return longer

    def _widen(self, values: Tensor, fill: int) -> Tensor:
        """[B, L] to [B, L + P]."""
        count, before = self.vectors.shape[1], self.before.unsqueeze(1)
        columns = torch.arange(values.shape[1] + count, device=values.device).expand(len(values), -1)
        source = columns.where(columns < before, (columns - count).clamp(min=0))
        return values.gather(1, source).masked_fill((columns >= before) & (columns < before + count), fill)

    @contextmanager
    def placed(self, towers: Towers, length: int) -> Iterator[None]:
        """Context in which the model sees the vectors, if it is given an extended batch.

        The embeddings of single tokens, which a generation looks up one by one behind the prompt, are left as they are.

        Args:
            length: L + P, columns of the extended batch.
        """

        def place(_: nn.Module, arguments: Any, embedded: Tensor) -> Tensor:
            if embedded.dim() != 3 or embedded.shape[1] == 1:
                return embedded
            assert embedded.shape[1] == length, "the model was not given what `ContinualStrategy.inputs` returns"
            beams = len(embedded) // len(self.vectors)  # those of a sample are next to each other
            vectors, before = self.vectors.repeat_interleave(beams, 0), self.before.repeat_interleave(beams)
            columns = before.unsqueeze(1) + torch.arange(vectors.shape[1], device=before.device)
            return embedded.scatter(1, columns.unsqueeze(2).expand_as(vectors), vectors.to(embedded.dtype))

        handle = towers.model.get_input_embeddings().register_forward_hook(place)
        try:
            yield
        finally:
            handle.remove()
