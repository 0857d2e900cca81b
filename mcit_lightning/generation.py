"""Greedy generation of short answers for a batch."""

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin


def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: dict[str, Any],
    max_new_tokens: int,
    end_id: int,
    min_new_tokens: int = 0,
    *,
    lockstep: bool = False,
) -> list[str]:
    """B answers without special tokens and surrounding white space; arguments as for `generate_tokens`."""
    answers = generate_tokens(model, inputs, max_new_tokens, end_id, min_new_tokens, lockstep=lockstep)
    return [text.strip() for text in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]


@torch.no_grad()
def generate_tokens(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    max_new_tokens: int,
    end_id: int,
    min_new_tokens: int = 0,
    *,
    lockstep: bool = False,
) -> Tensor:
    """Answer a batch of left-padded prompts, greedily and with a KV cache.

    A row's tokens do not depend on the rest of the batch: padding is masked, and positions count real tokens.

    Args:
        inputs: the processor's tensors; `input_ids` [B, L] padded on the left, so that all answers start at position L.
        max_new_tokens: a row stops there or at the end token.
        end_id: token that ends an answer in the prompt template; not for every model the tokenizer's end of text.
        min_new_tokens: the end token is not chosen before.
        lockstep: run until all processes have finished their batch, because the model's weights are spread over them.

    Returns:
        [B, N], the new tokens, N at most `max_new_tokens`; what follows a row's end token is padding.
    """
    input_ids: Tensor = inputs["input_ids"]
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        # The last position by index, not as the slice that `generate` would take: a slice is not contiguous, and the product
        # of one with the output head then copies the head for every row (on a CPU, 250 times the time in bfloat16).
        options["logits_to_keep"] = torch.tensor([-1], device=input_ids.device)
    generated = model.generate(  # type: ignore[operator]
        **inputs,
        **options,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        min_new_tokens=min_new_tokens or None,
        use_cache=True,
        eos_token_id=end_id,
        synced_gpus=lockstep,
    )
    answers: Tensor = generated[:, input_ids.shape[1] :]
    return answers
