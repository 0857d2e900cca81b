"""`prompt.pad_to_square`: the square that LLaVA-1.5 trains with, in training and in evaluation."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mcit_lightning.config import PromptConfig
from mcit_lightning.data.collate import EvalCollator, TrainCollator
from mcit_lightning.data.encode import mean_colour, pad_to_square
from mcit_lightning.data.records import Sample

RED, GREY = (250, 0, 0), (122, 116, 104)


@pytest.mark.parametrize(
    ("size", "corner"),
    [((6, 2), (0, 2)), ((2, 6), (2, 0)), ((5, 2), (0, 1)), ((3, 3), (0, 0))],
)
def test_the_picture_is_in_the_middle(size: tuple[int, int], corner: tuple[int, int]) -> None:
    """The offset is (side - length) // 2, so an odd border is one pixel wider on the right or below."""
    square = pad_to_square(Image.new("RGB", size, RED), GREY)
    side = max(size)
    assert square.size == (side, side)
    for x in range(side):
        for y in range(side):
            inside = corner[0] <= x < corner[0] + size[0] and corner[1] <= y < corner[1] + size[1]
            assert square.getpixel((x, y)) == (RED if inside else GREY)


@pytest.fixture
def wide(tmp_path: Path) -> Sample:
    Image.new("RGB", (60, 20), RED).save(tmp_path / "wide.png")
    return Sample("a", "t", (str(tmp_path / "wide.png"),), (("user", "Which colour?"), ("assistant", "red")))


def test_training_and_evaluation_see_the_padded_picture(smoke_processor: Any, wide: Sample, tmp_path: Path) -> None:
    prompt = PromptConfig(pad_to_square=True)
    trained = TrainCollator(smoke_processor, prompt, max_length=200)([wide])["inputs"]["pixel_values"]
    asked = Sample("a", "t", wide.images, wide.turns[:1])
    evaluated = EvalCollator(smoke_processor, prompt)([asked])["inputs"]["pixel_values"]
    assert torch.equal(trained, evaluated)
    # Rows of padding are zero after normalisation (up to the rounding of the colour); without padding there are none.
    assert trained[0, :, 0].abs().max() < 0.03 and trained[0, :, -1].abs().max() < 0.03
    cropped = TrainCollator(smoke_processor, PromptConfig(), max_length=200)([wide])["inputs"]["pixel_values"]
    assert cropped[0, 0].min() > 0.5
    pad_to_square(Image.open(wide.images[0]).convert("RGB"), mean_colour(smoke_processor)).save(tmp_path / "b.png")
    by_hand = Sample("a", "t", (str(tmp_path / "b.png"),), wide.turns)
    again = TrainCollator(smoke_processor, prompt, max_length=200)([by_hand])["inputs"]["pixel_values"]
    assert torch.equal(again, trained)


def test_a_processor_without_a_mean_colour(smoke_processor: Any) -> None:
    processor = copy.copy(smoke_processor)
    processor.image_processor = copy.copy(smoke_processor.image_processor)
    processor.image_processor.image_mean = None
    with pytest.raises(ValueError, match=r"pad_to_square is true, but .* has no image_mean.*Set prompt.pad_to_square"):
        TrainCollator(processor, PromptConfig(pad_to_square=True), max_length=200)
