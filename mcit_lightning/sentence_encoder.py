"""Embeddings of instructions by a sentence encoder (Sentence-BERT: Reimers and Gurevych, EMNLP 2019).

Shapes: B samples, L tokens of the longest instruction, e the encoder's width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mcit_lightning.data.records import Sample, Turns
from mcit_lightning.errors import first_line
from mcit_lightning.loss import Batch


class InstructionReader:
    """Finds each sample's instruction and tokenizes it; runs where batches are made, so in the loader processes if there are any.

    The instruction is the longest of the listed ones that the user's first turn contains, white space aside. A turn that
    contains none is its own instruction.

    Args:
        tokenizer: the sentence encoder's.
        max_tokens: what is longer loses its front, because the instruction stands at the end of a question.
        instructions: the listed ones.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int, instructions: Sequence[str]) -> None:
        self.tokenizer, self.max_tokens = tokenizer, max_tokens
        self.tokenizer.truncation_side = "left"
        self.instructions = sorted({_words(text) for text in instructions}, key=len, reverse=True)

    def __call__(self, samples: Sequence[Sample], turns: Sequence[Turns]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, each [B, L]."""
        questions = [next(text for role, text in spoken if role == "user") for spoken in turns]
        tokens = self.tokenizer(
            [self.instruction(question) for question in questions],
            padding=True,
            truncation=True,
            max_length=self.max_tokens,
            return_tensors="pt",
        )
        return {name: tokens[name] for name in ("input_ids", "attention_mask")}

    def instruction(self, question: str) -> str:
        """The instruction that a question holds."""
        text = _words(question)
        return next((known for known in self.instructions if known in text), text)


class SentenceEncoder:
    """Means over the last hidden states of a frozen encoder. Not a module: it is no part of a checkpoint.

    Args:
        name: a folder or hub name, for example `sentence-transformers/all-MiniLM-L6-v2`.
        instructions: see `InstructionReader`.

    Raises:
        ValueError: there is no complete encoder and tokenizer under the name.
    """

    def __init__(self, name: str, instructions: Sequence[str]) -> None:
        self.model, tokenizer = _load(name)
        config: Any = self.model.config
        self.width: int = config.hidden_size
        self.reader = InstructionReader(tokenizer, _max_tokens(config, tokenizer), instructions)

    @torch.no_grad()
    def embed(self, batch: Batch) -> Tensor:
        """[B, e] in float32."""
        assert "strategy_inputs" in batch, "the data module asks the strategy for its reader in `setup`"
        inputs = batch["strategy_inputs"]
        ids: Tensor = inputs["input_ids"]
        mask: Tensor = inputs["attention_mask"]
        if self.model.device != ids.device:
            self.model.to(ids.device)  # type: ignore[arg-type]
        with torch.autocast(ids.device.type, enabled=False):
            hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)


def _words(text: str) -> str:
    return " ".join(text.split())


def _max_tokens(config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """What the positions and the tokenizer allow; some position tables begin behind the padding token."""
    positions = getattr(config, "max_position_embeddings", tokenizer.model_max_length)
    offset = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "mpnet") else 0
    return int(min(positions - offset, tokenizer.model_max_length))


def _load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    remedy = (
        "Give a folder with a saved encoder and its tokenizer, or a hub name that this machine can reach, for example "
        "sentence-transformers/all-MiniLM-L6-v2"
    )
    try:
        config = AutoConfig.from_pretrained(name)
        if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
            raise ValueError(f"it is a {config.model_type!r} model, not an encoder of text")
        loaded: Any = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        model, report = loaded
        missing = [key for key in report["missing_keys"] if "pooler" not in key]  # sentence encoders leave it out
        if missing:
            raise ValueError(f"weights are missing: {', '.join(sorted(missing)[:3])}")
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(
            f"strategy.instruction_encoder: cannot load {name!r}: {reason.rstrip('.')}. {remedy}"
        ) from error
    model.requires_grad_(False)
    return model.eval(), tokenizer
