"""From samples to token sequences with the answer tokens marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from mcit_lightning.config import PromptConfig
from mcit_lightning.data.images import load_image
from mcit_lightning.data.prompts import Piece, build_template
from mcit_lightning.data.records import ImageSource, Sample, Turns


@dataclass
class TokenRow:
    """One conversation in tokens.

    Args:
        columns: `input_ids` and every other sequence-like key of the processor (`mm_token_type_ids`, ...), equally
            long.
        is_target: whether the token belongs to an answer, its end token included.
    """

    columns: dict[str, list[int]]
    is_target: list[bool]

    def __len__(self) -> int:
        return len(self.is_target)

    def cut(self, length: int) -> None:
        """Drop the tokens from `length` on."""
        self.columns = {key: values[:length] for key, values in self.columns.items()}
        self.is_target = self.is_target[:length]


class Encoder:
    """Tokenizes conversations piece by piece: an answer is never tokenized together with the prompt before it.

    The processor sees the first prompt of every conversation, with all images, in one call; it expands the image
    tokens. Answers and later prompts are appended with the bare tokenizer. Training and evaluation therefore see the same tokens.

    Args:
        processor: the backbone's processor.
        prompt: which template, and whether images are padded to a square.

    Raises:
        ValueError: the tokenizer has no padding or end token, the template does not fit the processor, or images are to be
            padded and the processor has no mean colour.
    """

    def __init__(self, processor: Any, prompt: PromptConfig) -> None:
        self.processor = processor
        self.tokenizer = processor.tokenizer
        for name in ("pad_token", "eos_token"):
            if getattr(self.tokenizer, name) is None:
                raise ValueError(
                    f"The backbone's tokenizer has no {name}. Save the checkpoint with one (processor.tokenizer.{name} = "
                    "...; processor.save_pretrained(...)) and name that folder in backbone.id."
                )
        self.template = build_template(prompt, processor)
        self._padding = mean_colour(processor) if prompt.pad_to_square else None
        self.end_id: int = self.tokenizer.convert_tokens_to_ids(self.template.end)
        """The token that ends an answer; generation must stop at it."""
        self._image_ids = {processor.image_token_id, getattr(self.tokenizer, "image_token_id", None)} - {None}
        # Templates that write the begin token themselves must not get a second one.
        start = self.template.pieces((("user", "?"),), 0)[0].prompt
        begins = self.tokenizer.bos_token is not None and start.startswith(self.tokenizer.bos_token)
        self._options: dict[str, Any] = {"add_special_tokens": False} if begins else {}
        # SentencePiece tokenizers put a space before every text they are given.
        self._adds_space = self.tokenizer.tokenize("a")[0].startswith("\u2581")

    def encode(self, samples: Sequence[Sample], turns: Sequence[Turns]) -> tuple[list[TokenRow], dict[str, Tensor]]:
        """Tokenize `turns[b]` about the images of `samples[b]`.

        Returns:
            One row per sample, and the processor's other tensors (`pixel_values`, ...), unchanged.

        Raises:
            ValueError: an image cannot be read, or a text contains the processor's image token.
        """
        pieces = [self._pieces(sample, spoken) for sample, spoken in zip(samples, turns, strict=True)]
        images = [[self._image(image, sample) for image in sample.images] for sample in samples]
        outputs = dict(
            self.processor(
                text=[row[0].prompt for row in pieces],
                images=images if any(images) else None,
                padding=True,
                padding_side="right",
                return_tensors="pt",
                **self._options,
            )
        )
        if "labels" in outputs:
            raise NotImplementedError(
                f"{type(self.processor).__name__} is made for prefix language models, which the prompts here do not support. "
                "Choose another backbone.id."
            )
        mask = outputs.pop("attention_mask").bool()
        # What is as long as the text belongs to the tokens; all else belongs to the images.
        tokens = {
            key: value for key, value in outputs.items() if value.shape == mask.shape and not value.is_floating_point()
        }
        others = {key: value for key, value in outputs.items() if key not in tokens}
        rows = [
            TokenRow({key: value[number][mask[number]].tolist() for key, value in tokens.items()}, [])
            for number in range(len(samples))
        ]
        self._append(rows, pieces)
        return rows, others

    def end_of_images(self, row: TokenRow) -> int:
        """Position after the row's last image token, 0 if there is none."""
        ids = row.columns["input_ids"]
        return next((index + 1 for index in reversed(range(len(ids))) if ids[index] in self._image_ids), 0)

    def pad(self, rows: Sequence[TokenRow], side: Literal["left", "right"]) -> dict[str, Tensor]:
        """`input_ids`, `attention_mask` and the other sequence-like keys, each [B, L]."""
        length = max(map(len, rows))

        def stack(sequences: list[list[int]], value: int) -> Tensor:
            padding = [[value] * (length - len(sequence)) for sequence in sequences]
            pairs = zip(sequences, padding, strict=True)
            return torch.tensor([p + s if side == "left" else s + p for s, p in pairs], dtype=torch.long)

        tensors = {
            key: stack([row.columns[key] for row in rows], self.tokenizer.pad_token_id if key == "input_ids" else 0)
            for key in rows[0].columns
        }
        return {**tensors, "attention_mask": stack([[1] * len(row) for row in rows], 0)}

    def _image(self, source: ImageSource, sample: Sample) -> Image.Image:
        image = load_image(source, sample)
        return image if self._padding is None else pad_to_square(image, self._padding)

    def _pieces(self, sample: Sample, turns: Turns) -> list[Piece]:
        pieces = self.template.pieces(turns, len(sample.images))
        token = self.template.image_token
        texts = [piece.prompt + (piece.answer or "") for piece in pieces]
        if texts[0].count(token) != len(sample.images) or any(token in text for text in texts[1:]):
            raise ValueError(
                f"{sample.place}: the prompt holds {sum(text.count(token) for text in texts)} image token(s) {token!r} for "
                f"{len(sample.images)} image(s). Remove {token!r} from the row's texts, or, if they have none, choose "
                "another prompt.template."
            )
        return pieces

    def _append(self, rows: list[TokenRow], pieces: list[list[Piece]]) -> None:
        texts = []
        for row in pieces:
            for number, piece in enumerate(row):
                texts += [] if number == 0 else [self._continuation(piece.prompt)]
                texts += [] if piece.answer is None else [self._answer(piece.answer)]
        ids = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        for target, row in zip(rows, pieces, strict=True):
            target.is_target = [False] * len(target.columns["input_ids"])
            for number, piece in enumerate(row):
                if number > 0:
                    self._extend(target, next(ids), is_target=False)
                if piece.answer is not None:
                    self._extend(target, [*next(ids), self.end_id], is_target=True)

    def _extend(self, row: TokenRow, ids: list[int], *, is_target: bool) -> None:
        for key, values in row.columns.items():
            values.extend(ids if key == "input_ids" else [0] * len(ids))
        row.is_target.extend([is_target] * len(ids))

    def _continuation(self, prompt: str) -> str:
        return prompt.removeprefix(" ") if self._adds_space else prompt

    def _answer(self, answer: str) -> str:
        if not answer:
            return ""
        lead = "" if self._adds_space and self.template.lead == " " else self.template.lead
        return lead + answer


def mean_colour(processor: Any) -> tuple[int, int, int]:
    """The RGB colour that the processor's normalisation maps to zero, rounded down as LLaVA-1.5 does.

    Raises:
        ValueError: the processor does not normalise by three channel means.
    """
    means = getattr(getattr(processor, "image_processor", None), "image_mean", None)
    if not isinstance(means, list | tuple) or len(means) != 3:
        raise ValueError(
            f"prompt.pad_to_square is true, but {type(processor).__name__} has no image_mean of three channels to pad with "
            f"(it is {means!r}). Set prompt.pad_to_square to false."
        )
    red, green, blue = (int(mean * 255) for mean in means)
    return red, green, blue


def pad_to_square(image: Image.Image, colour: tuple[int, int, int]) -> Image.Image:
    """The picture in the middle of a square of its longer side; where a border is odd, the right or lower one is wider."""
    width, height = image.size
    if width == height:
        return image
    side = max(width, height)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
