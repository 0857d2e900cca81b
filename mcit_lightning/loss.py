"""The language-modelling loss, computed on answer tokens only."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

Batch = dict[str, Any]
"""What the collators make; `mcit_lightning.data.collate` documents the keys."""


def prompt_mask(batch: Batch) -> Tensor:
    """[B, L], 1 at the tokens of the prompt, image tokens included: all real tokens before the first answer token.

    In an evaluation batch, that is the attention mask.
    """
    mask: Tensor = batch["inputs"]["attention_mask"]
    if "targets" not in batch:
        return mask
    size, length = mask.shape
    starts = torch.full((size,), length, device=mask.device)
    column = batch["positions"] - batch["rows"] * length + 1
    starts = starts.scatter_reduce(0, batch["rows"], column, "amin")
    return mask * (torch.arange(length, device=mask.device) < starts.unsqueeze(1))


@dataclass
class LossOutput:
    """A scalar loss to minimise, and parts of it to log under their names."""

    loss: Tensor
    parts: dict[str, Tensor] = field(default_factory=dict)


def answer_logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Logits that predict the answer tokens, [N, vocabulary].

    The output head is applied to these N positions alone: with short answers the vocabulary product over the whole
    sequence would cost more than the decoder. The positions come from the collator, so nothing is read back from the device.
    """
    hidden = model.base_model(**batch["inputs"]).last_hidden_state
    selected = hidden.flatten(0, 1).index_select(0, batch["positions"])
    return model.get_output_embeddings()(selected)


def sample_losses(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[B], each sample's mean cross-entropy over its own answer tokens; zero for a sample without any.

    Unlike `answer_loss`, a sample's value does not depend on the rest of the batch.
    """
    losses = F.cross_entropy(answer_logits(model, batch).float(), batch["targets"], reduction="none")
    rows, size = batch["rows"], len(batch["id"])
    counts = torch.bincount(rows, minlength=size).clamp(min=1)
    return losses.new_zeros(size).index_add(0, rows, losses) / counts


def answer_loss(model: PreTrainedModel, batch: Batch) -> LossOutput:
    """Mean cross-entropy over the answer tokens of the micro-batch, in float32; zero if there are none."""
    logits = answer_logits(model, batch).float()
    total = F.cross_entropy(logits, batch["targets"], reduction="sum")
    return LossOutput(total / max(batch["targets"].numel(), 1))
