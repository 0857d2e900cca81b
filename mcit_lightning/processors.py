"""Processors that handle text and images only.

The processors of InternVL, SmolVLM, LLaVA-OneVision and Qwen-VL also read videos, for which transformers needs torchvision, even
where no video is ever given. The classes here are the same processors without that part.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

import transformers
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, AutoProcessor, ProcessorMixin

from mcit_lightning.registry import nearest

VIDEO = "video_processor"


class ImagesOnly:
    """Goes in front of a processor class: it then has no video processor to load."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that the processor is put together from."""
        return [name for name in super().get_attributes() if name != VIDEO]  # type: ignore[misc]

    @classmethod
    def from_args_and_dict(cls, args: list[Any], processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The processor from its loaded parts and its saved options, whatever these say of videos."""
        return super().from_args_and_dict(args, {**processor_dict, VIDEO: None}, **kwargs)  # type: ignore[misc]

    def apply_chat_template(self, conversation: Any, *args: Any, **kwargs: Any) -> Any:
        """The conversation as text; SmolVLM's own method would ask the video processor first."""
        return ProcessorMixin.apply_chat_template(self, conversation, *args, **kwargs)  # type: ignore[arg-type]


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


def read_processor(name: str, images: Mapping[str, Any] | None = None, **arguments: Any) -> ProcessorMixin:
    """The processor of a checkpoint.

    Args:
        name: a local folder or a hub name.
        images: settings of the image processor that replace the checkpoint's.
        arguments: of `from_pretrained`: `revision`, `trust_remote_code`.

    Raises:
        ValueError: the image processor has no such setting.
        OSError: as `from_pretrained`.
    """
    known: Any = PROCESSOR_MAPPING.get(type(AutoConfig.from_pretrained(name, **arguments)), None)
    cls = AutoProcessor if known is None else images_only(known.__name__)
    processor = cls.from_pretrained(name, **arguments)
    if images:
        settings = processor.image_processor.to_dict()
        for key, value in images.items():
            if key not in settings:
                raise ValueError(
                    f"image_processor.{key} (value {value!r}): {type(processor.image_processor).__name__} has no such "
                    f"setting. {nearest(key, settings)}"
                )
        processor.image_processor = AutoImageProcessor.from_pretrained(name, **arguments, **images)
    return processor
