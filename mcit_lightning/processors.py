"""Processors that handle text and images only.

The processors of InternVL, SmolVLM, LLaVA-OneVision and Qwen-VL also read videos, for which transformers needs torchvision, even
where no video is ever given. The classes here are the same processors without that part.
"""

from functools import cache
from typing import Any

import transformers
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoProcessor, ProcessorMixin

VIDEO = "video_processor"


class ImagesOnly:
    """Goes in front of a processor class: it then has no video processor, neither to be loaded nor to be given."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that the processor is put together from."""
        return [name for name in super().get_attributes() if name != VIDEO]  # type: ignore[misc]

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, video_processor: Any = None, **options: Any):
        super().__init__(image_processor, tokenizer, None, **options)  # type: ignore[call-arg]


@cache
def images_only(name: str) -> type[ProcessorMixin]:
    """The processor class of transformers called `name` without its video part; unchanged if it has none."""
    base: type[ProcessorMixin] = getattr(transformers, name)
    if VIDEO not in base.get_attributes():
        return base
    return type(name, (ImagesOnly, base), {"__module__": __name__, "__doc__": base.__doc__})


def __getattr__(name: str) -> type[ProcessorMixin]:
    """`processors.InternVLProcessor` and the like, so that loader processes find the class of a pickled processor."""
    if not name.endswith("Processor") or not hasattr(transformers, name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return images_only(name)


def read_processor(name: str, **arguments: Any) -> ProcessorMixin:
    """The processor of a checkpoint.

    Args:
        name: a local folder or a hub name.
        arguments: of `from_pretrained`: `revision`, `trust_remote_code`.

    Raises:
        OSError, ValueError: as `from_pretrained`.
    """
    known = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(name, **arguments)))
    if known is None:
        return AutoProcessor.from_pretrained(name, **arguments)
    return images_only(known.__name__).from_pretrained(name, **arguments)
