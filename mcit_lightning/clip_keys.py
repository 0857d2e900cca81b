"""Keys from a CLIP checkpoint: image and question in the space in which CLIP compares them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig, CLIPConfig, CLIPModel, ProcessorMixin

from mcit_lightning.data.images import load_image
from mcit_lightning.data.records import Sample, Turns
from mcit_lightning.errors import first_line
from mcit_lightning.key_encoders import Embeddings, KeyEncoder, mean_by_owner
from mcit_lightning.loss import Batch
from mcit_lightning.processors import read_processor
from mcit_lightning.towers import Towers


class CLIPReader:
    """Turns samples into CLIP's inputs; runs where batches are made, so in the loader processes if there are any.

    The question is the user's first turn. CLIP reads 77 tokens: of a longer question the front is cut off, because the
    instruction, which tells tasks apart, stands at its end.

    Args:
        processor: a `CLIPProcessor`.
        max_tokens: positions of the text encoder.
    """

    def __init__(self, processor: ProcessorMixin, max_tokens: int) -> None:
        self.processor, self.max_tokens = processor, max_tokens
        self.processor.tokenizer.truncation_side = "left"

    def __call__(self, samples: Sequence[Sample], turns: Sequence[Turns]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask` [B, L], and `pixel_values` of all images, sample by sample, if there are any."""
        questions = [next(text for role, text in spoken if role == "user") for spoken in turns]
        inputs = dict(
            self.processor.tokenizer(
                questions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            )
        )
        images = [load_image(image, sample) for sample in samples for image in sample.images]
        if images:
            inputs["pixel_values"] = self.processor.image_processor(images, return_tensors="pt")["pixel_values"]
        return inputs


class CLIPKeyEncoder(KeyEncoder):
    """The projected image and text embeddings of a CLIP model, which works with every backbone.

    Args:
        name: a folder or hub name with a `CLIPModel` and its processor, for example `openai/clip-vit-large-patch14-336`.

    Raises:
        ValueError: there is no complete CLIP model and processor under the name.
    """

    def __init__(self, name: str) -> None:
        self.model, processor = _load(name)
        config: Any = self.model.config
        self.width: int = config.projection_dim
        self.reader: CLIPReader = CLIPReader(processor, config.text_config.max_position_embeddings)

    def widths(self, towers: Towers) -> tuple[int, int]:
        """The common space, twice."""
        return self.width, self.width

    @torch.no_grad()
    def embed(self, towers: Towers, batch: Batch) -> Embeddings:
        """The unit embeddings of a batch, computed in the data type of the backbone."""
        self.check(towers, batch)
        inputs, counts = batch["strategy_inputs"], batch["num_images"]
        ids: Tensor = inputs["input_ids"]
        device, dtype = ids.device, towers.model.get_input_embeddings().weight.dtype  # not quantised where the rest is
        if (self.model.device, self.model.dtype) != (device, dtype):
            self.model.to(device=device, dtype=dtype)  # type: ignore[call-arg]
        pooled = self.model.text_model(input_ids=ids, attention_mask=inputs["attention_mask"]).pooler_output
        text = F.normalize(self.model.text_projection(pooled).float(), dim=-1)
        image = text.new_zeros(len(counts), self.width)
        if any(counts):
            pooled = self.model.vision_model(pixel_values=inputs["pixel_values"].to(dtype)).pooler_output
            pictures = F.normalize(self.model.visual_projection(pooled).float(), dim=-1)
            owners = [row for row, count in enumerate(counts) for _ in range(count)]
            image = mean_by_owner(pictures, torch.tensor(owners, device=device), len(counts))
        return Embeddings(image, torch.tensor([float(count > 0) for count in counts], device=device), text)

    def check(self, towers: Towers, batch: Batch) -> None:
        """Every form of batch will do, if the collator was given the reader."""
        assert "strategy_inputs" in batch, "the data module asks the strategy for its reader in `setup`"


def _load(name: str) -> tuple[CLIPModel, ProcessorMixin]:
    remedy = (
        "Give a folder with a saved CLIPModel and its CLIPProcessor, or a hub name that this machine can reach, for example "
        "openai/clip-vit-large-patch14-336"
    )
    try:
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, CLIPConfig):
            raise ValueError(f"it is a {config.model_type!r} model, not CLIP")
        loaded: Any = CLIPModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        model, report = loaded
        if report["missing_keys"]:
            raise ValueError(f"weights are missing: {', '.join(sorted(report['missing_keys'])[:3])}")
        processor = read_processor(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = first_line(error)
        raise ValueError(f"strategy.key_encoder: cannot load {name!r}: {reason.rstrip('.')}. {remedy}") from error
    model.requires_grad_(False)
    return model.eval(), processor
