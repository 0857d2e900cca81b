"""Greedy generation of short answers for a batch."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin


@torch.no_grad()
def generate_answers(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    inputs: dict[str, Any],
    max_new_tokens: int,
    end_id: int,
    *,
    lockstep: bool = False,
) -> list[str]:
    """Answer a batch of left-padded prompts, greedily and with a KV cache.

    Args:
        inputs: the processor's tensors; `input_ids` [B, L] padded on the left, so that all answers start at position L.
        max_new_tokens: a row stops there or at the end token.
        end_id: token that ends an answer in the prompt template; not for every model the tokenizer's end of text.
        lockstep: run until all processes have finished their batch, because the model's weights are spread over them.

    Returns:
        B answers without special tokens and surrounding white space.
    """
    input_ids: Tensor = inputs["input_ids"]
    generated = model.generate(  # type: ignore[operator]
        **inputs,
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        use_cache=True,
        eos_token_id=end_id,
        synced_gpus=lockstep,
    )
    answers = generated[:, input_ids.shape[1] :]
    return [text.strip() for text in processor.tokenizer.batch_decode(answers, skip_special_tokens=True)]
