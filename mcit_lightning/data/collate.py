"""Batches: plain dictionaries that Lightning moves to the device."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from mcit_lightning.config import PromptConfig, TaskConfig
from mcit_lightning.data.encode import Encoder
from mcit_lightning.data.records import Sample, Turns
from mcit_lightning.feature_cache import picture_keys

SampleReader = Callable[[Sequence[Sample], Sequence[Turns]], dict[str, Tensor]]
"""Makes tensors of samples and the turns that the model sees of them, beside the model's own inputs."""


@runtime_checkable
class ReadsSamples(Protocol):
    """A strategy that wants to know more of the samples than what the model takes."""

    def sample_reader(self) -> SampleReader | None:
        """What every batch is to hold as `strategy_inputs`; None for nothing."""
        ...


@runtime_checkable
class AsksItself(Protocol):
    """A strategy that asks the model questions of its own about the samples."""

    def use_prompts(self, encoder: Encoder, tasks: Mapping[str, TaskConfig]) -> None:
        """Called once, before any batch: how a conversation becomes tokens, and what the configuration says of the tasks."""
        ...


class TrainCollator:
    """Conversations with their answer tokens as targets.

    A batch holds

    * `inputs`: what the model takes, right-padded: `input_ids` and `attention_mask` [B, L] and every other tensor of
      the processor;
    * `targets` [N]: the answer tokens (end token included) of the whole batch, row by row;
    * `positions` [N]: index `b * L + (l - 1)` of the hidden state, flattened over [B, L], that predicts `targets[n]`;
    * `rows` [N]: the batch row `b` of each target;
    * `task`, `id`: one string per row; `num_images`: images of each row; `num_tokens`: tokens without padding;
    * `index`: row number in the task's file; `length`: tokens of each row before it was cut; `cut`: None for a whole row,
      `shortened` for one that lost the end of its text, `dropped` for one that lost every answer token or whose prompt
      alone is too long, and which therefore has no target;
    * `shortened`, `dropped`: how many rows of each kind;
    * `strategy_inputs`, where there is a `reader`: what it makes of the samples.

    A row longer than `max_length` loses the end of its text. Image tokens stay even if they alone are longer.

    Args:
        processor: the backbone's processor.
        prompt: which template.
        max_length: tokens per row, image tokens included.
    """

    reader: SampleReader | None = None
    keys = False
    """Add `picture_keys` (see `mcit_lightning.feature_cache`)."""

    def __init__(self, processor: Any, prompt: PromptConfig, *, max_length: int) -> None:
        self.encoder = Encoder(processor, prompt)
        self.max_length = max_length

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch of `samples`. Raises ValueError for an image that cannot be read."""
        rows, others = self.encoder.encode(samples, [sample.turns for sample in samples])
        lengths = [len(row) for row in rows]
        cut: list[str | None] = [None] * len(rows)
        for number, row in enumerate(rows):
            if len(row) > self.max_length:
                row.cut(max(self.max_length, self.encoder.end_of_images(row)))
                cut[number] = "shortened" if any(row.is_target) else "dropped"
        length = max(map(len, rows))
        marks = [(b, at) for b, row in enumerate(rows) for at, target in enumerate(row.is_target) if target]
        return {
            "inputs": {**self.encoder.pad(rows, "right"), **others},
            "targets": torch.tensor([rows[b].columns["input_ids"][at] for b, at in marks], dtype=torch.long),
            "positions": torch.tensor([b * length + at - 1 for b, at in marks], dtype=torch.long),
            "rows": torch.tensor([b for b, _ in marks], dtype=torch.long),
            "task": [sample.task for sample in samples],
            "id": [sample.id for sample in samples],
            "index": [sample.row for sample in samples],
            "num_images": [len(sample.images) for sample in samples],
            "num_tokens": sum(map(len, rows)),
            "length": lengths,
            "shortened": cut.count("shortened"),
            "dropped": cut.count("dropped"),
            "cut": cut,
            **({"picture_keys": picture_keys(others)} if self.keys else {}),
            **_read(self.reader, samples, [sample.turns for sample in samples]),
        }


class EvalCollator:
    """Prompts to answer: `inputs` left-padded, never cut, without the reference answer.

    Beside them `task`, `id`, `num_images`, `index` (row number in the file), `prompt` (the question without image tokens
    and suffix), `reference` (the answer as in the file) and `extra` (the row's other keys), one entry per row, and
    `strategy_inputs` as in training.

    Args:
        processor: the backbone's processor.
        prompt: which template.
        suffix: appended to the last question after a new line, or on the same line if it begins with a blank, unless the question
            ends with it; empty for none.
    """

    reader: SampleReader | None = None
    keys = False

    def __init__(self, processor: Any, prompt: PromptConfig, *, suffix: str = "") -> None:
        self.encoder = Encoder(processor, prompt)
        self.suffix = suffix

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch of `samples`. Raises ValueError for an image that cannot be read."""
        turns = [self._asked(sample.turns) for sample in samples]
        rows, others = self.encoder.encode(samples, turns)
        return {
            "inputs": {**self.encoder.pad(rows, "left"), **others},
            "task": [sample.task for sample in samples],
            "id": [sample.id for sample in samples],
            "num_images": [len(sample.images) for sample in samples],
            "index": [sample.row for sample in samples],
            "prompt": [sample.turns[-1][1] for sample in samples],
            "reference": [sample.reference for sample in samples],
            "extra": [sample.extra for sample in samples],
            **({"picture_keys": picture_keys(others)} if self.keys else {}),
            **_read(self.reader, samples, turns),
        }

    def _asked(self, turns: Turns) -> Turns:
        role, text = turns[-1]
        assert role == "user", "an evaluation sample ends with a question"
        # copies of one benchmark differ in whether they hold it
        if not self.suffix or text.rstrip().endswith(self.suffix.strip()):
            return turns
        between = "" if self.suffix.startswith(" ") else "\n"
        return (*turns[:-1], (role, f"{text}{between}{self.suffix}"))


def _read(reader: SampleReader | None, samples: Sequence[Sample], turns: Sequence[Turns]) -> dict[str, Any]:
    return {} if reader is None else {"strategy_inputs": reader(samples, turns)}
