"""Train the quickstart's projector on captions, with the tower and the language model frozen (LLaVA's first stage).

    python -m mcit_lightning.quickstart.align

writes `projector.safetensors` into the package, which `prepare` then loads. Only needed after a change of the model.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from mcit_lightning.quickstart.captions import QUESTIONS, Caption, captions
from mcit_lightning.quickstart.model import IMAGE_SIZE, PROJECTOR_FILE, build_model

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

PEAK_LR = 2e-3

log = logging.getLogger(__name__)


@torch.no_grad()
def encode_pictures(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, items: Sequence[Caption], rng: random.Random
) -> Tensor:
    """Features of every picture, once: the tower is frozen. Half precision keeps the set in memory."""
    features = []
    for start in range(0, len(items), 32):
        pictures = [item.paint(IMAGE_SIZE, rng) for item in items[start : start + 32]]
        pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1]
        features.append(hidden[:, 1:].half())
    return torch.cat(features)


def caption_loss(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    features: Tensor,
    questions: Sequence[str],
    answers: Sequence[str],
) -> Tensor:
    """Mean cross-entropy of the captions' tokens, with logits for those tokens only (the vocabulary is large)."""
    count = features.shape[1]
    image = [model.config.image_token_id] * count
    rows, label_rows = [], []
    for question, answer in zip(questions, answers, strict=True):
        head = tokenizer("<|im_start|>user\n").input_ids + image
        head += tokenizer(f"\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        tail = tokenizer(f"{answer}<|im_end|>").input_ids
        rows.append(head + tail)
        label_rows.append([-100] * len(head) + tail)
    length = max(map(len, rows))
    pad = tokenizer.pad_token_id
    ids = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    labels = torch.tensor([row + [-100] * (length - len(row)) for row in label_rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    embeddings = model.get_input_embeddings()(ids)
    projected = model.model.multi_modal_projector(features.float()).to(embeddings.dtype)
    at_image = (ids == model.config.image_token_id).unsqueeze(-1).expand_as(embeddings)
    embeddings = embeddings.masked_scatter(at_image, projected)
    hidden = model.model.language_model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state
    wanted = labels[:, 1:] != -100
    logits = model.lm_head(hidden[:, :-1][wanted])
    return torch.nn.functional.cross_entropy(logits.float(), labels[:, 1:][wanted])


def align(steps: int, batch_size: int, seed: int, bf16: bool) -> dict[str, Tensor]:
    """Train the projector from its seeded start and return its weights in half precision."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model, processor = build_model(seed, aligned=False)
    items = captions(seed)
    log.info("encoding %d captioned pictures", len(items))
    features = encode_pictures(model, processor, items, rng)
    projector = model.model.multi_modal_projector
    model.requires_grad_(False)
    projector.requires_grad_(True)
    if bf16:  # only what is frozen; the projector stays in full precision
        model.model.language_model.to(torch.bfloat16)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=PEAK_LR, weight_decay=0.0)
    order: list[int] = []
    mean_loss, start = 0.0, time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * min(1.0, (step + 1) / 20, 0.02 + 0.5 * (1 + math.cos(math.pi * step / steps)))
        if len(order) < batch_size:
            order = rng.sample(range(len(items)), len(items))
        chosen = [order.pop() for _ in range(batch_size)]
        questions = [rng.choice(QUESTIONS) for _ in chosen]
        answers = [items[index].text for index in chosen]
        loss = caption_loss(model, processor.tokenizer, features[chosen], questions, answers)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean_loss = loss.item() if step == 0 else 0.95 * mean_loss + 0.05 * loss.item()
        if step % 20 == 0 or step == steps - 1:
            log.info("step %d/%d loss %.3f (%.0f s)", step + 1, steps, mean_loss, time.perf_counter() - start)
    return {name: value.detach().half().contiguous() for name, value in projector.state_dict().items()}


def main() -> None:
    """Command line of the alignment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="frozen weights in bfloat16, faster where the CPU knows it")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / PROJECTOR_FILE)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    weights = align(options.steps, options.batch_size, options.seed, options.bf16)
    save_file(weights, options.output)
    log.info("wrote %s", options.output)


if __name__ == "__main__":
    main()
