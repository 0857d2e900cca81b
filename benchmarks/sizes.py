"""The sizes of the two models that the benchmarks build with random weights."""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Sizes:
    """What the configurations of a tower and a decoder are made of."""

    vision: dict[str, Any]
    text: dict[str, Any]
    pixels: int
    """Side of a picture; its patches have 14."""
    tied: bool
    """The output head is the embedding."""

    def divided(self, by: int) -> "Sizes":
        """The same with this fraction of the layers of both towers."""
        vision, text = (
            {**part, "num_hidden_layers": part["num_hidden_layers"] // by} for part in (self.vision, self.text)
        )
        return replace(self, vision=vision, text=text)


QUICKSTART = Sizes(
    {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 6},
    {
        "vocab_size": 49_160,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    pixels=84,
    tied=True,
)
"""A ViT-S tower over 36 patches, and SmolLM2-135M's decoder."""
LLAVA7B = Sizes(
    {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16},
    {
        "vocab_size": 32_064,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    pixels=336,
    tied=False,
)
"""LLaVA-1.5-7B: CLIP ViT-L/14-336 and Vicuna-7B."""
