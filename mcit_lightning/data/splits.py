"""One split of one task: checked from end to end when it is opened, read row by row afterwards."""

import logging
import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from mcit_lightning.config import DataConfig, TaskConfig
from mcit_lightning.data.hf import read_dataset
from mcit_lightning.data.images import ImageFolder
from mcit_lightning.data.readers import Rows, file_format, read_file
from mcit_lightning.data.records import ImageSource, Place, Sample, Split, Turns, parse_row
from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.evaluation.metrics import get_metric

CHARACTERS_PER_TOKEN = 4
TOKENS_PER_IMAGE = 256

logger = logging.getLogger(__name__)


class TaskSplit(Dataset[Sample]):
    """The rows of a split that the run uses, as samples with absolute image paths.

    Args:
        task: name of the task.
        split: which split.
        rows: the whole file.
        keep: row numbers in use, ascending.
        lengths: estimated tokens of each row in use.
        images: where its images are.
        key: the configuration key of the file, for messages.
        text_only: some row has no image.
    """

    def __init__(
        self,
        task: str,
        split: Split,
        rows: Rows,
        *,
        keep: np.ndarray,
        lengths: np.ndarray,
        images: ImageFolder,
        key: str,
        text_only: bool = False,
    ) -> None:
        self.task = task
        self.split = split
        self.lengths = lengths
        self.total = len(rows)
        """Rows in the file, of which `len(self)` are used."""
        self.text_only = text_only
        """Some row of the file has no image."""
        self._rows = rows
        self._keep = keep
        self._images = images
        self._key = key

    def __len__(self) -> int:
        return len(self._keep)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        row = int(self._keep[index])
        place = Place(self._rows.source, self._key, row)
        sample = parse_row(self._rows.row(row), place, task=self.task, split=self.split)
        paths = tuple(self._images.path(image) if isinstance(image, str) else image for image in sample.images)
        return replace(sample, images=paths)


def open_split(data: DataConfig, task: str, config: TaskConfig, split: Split, seed: int) -> TaskSplit:
    """Read and check one split.

    Every row of the file is parsed; the images of all rows in use must exist. Training ids may repeat, because
    published files repeat them. A test split may not ask the same question under the same `question_id` twice; one
    `question_id` with different questions (TextVQA's ids are image ids) is accepted.

    Args:
        data: root, limits and fraction.
        task: name of the task.
        config: its files.
        split: which one to open. The task must name a file for it.
        seed: of the subsample that `fraction` and `limit_*` take.

    Raises:
        ValueError: the file, a row or an image is missing or malformed, or nothing is left to use.
    """
    key = f"tasks.{task}.{split}"
    name: str | None = getattr(config, split)
    if not name:
        raise ValueError(f"{key} is not set. Name the task's {split} file, relative to data.root ({data.root}).")
    root = os.path.abspath(os.path.expanduser(data.root))
    check = _Check(task, split, key, root, config.metric)
    kind = file_format(name, config.format, key)
    rows: Rows
    if kind == "hf":
        check.source = name
        rows = read_dataset(name, Path(root), config.columns, key, split, check)
    else:
        if config.columns:
            raise ValueError(
                f"tasks.{task}.columns is set, but {key} ({name}) is read as {kind}, whose keys are fixed. Remove "
                f"`columns`, or set tasks.{task}.format to hf."
            )
        path = Path(root, name)
        check.source = str(path)
        rows = read_file(path, kind, key, check)
    if len(rows) == 0:
        raise ValueError(f"{rows.source} ({key}) holds no rows. Give the task at least one, or take it out of `order`.")
    keep = _subsample(data, len(rows), split, seed, task)
    images = ImageFolder(root, config.images)
    check.images_exist(images, keep, f"tasks.{task}.images")
    if check.repeated:
        logger.info("%s (%s): %d of %d ids are repeated", rows.source, key, check.repeated, len(rows))
    return TaskSplit(
        task,
        split,
        rows,
        keep=keep,
        lengths=np.frombuffer(check.lengths, dtype=np.int32)[keep],
        images=images,
        key=key,
        text_only=check.text_only,
    )


class _Check:
    """Sees every row once while the file is read, and forgets all but lengths and image names."""

    def __init__(self, task: str, split: Split, key: str, root: str, metric: str) -> None:
        self.source = ""
        self.lengths = array("i")
        self.repeated = 0
        self.text_only = False
        self._task = task
        self._split: Split = split
        self._key = key
        self._root = root
        self._name = metric
        self._metric = get_metric(metric)()
        self._names: list[tuple[ImageSource, ...]] = []
        self._seen: dict[str, int] = {}
        self._questions: dict[tuple[str, Turns], int] = {}

    def __call__(self, index: int, row: Any) -> None:
        place = Place(self.source, self._key, index)
        sample = parse_row(row, place, task=self._task, split=self._split)
        self.lengths.append(sample.characters // CHARACTERS_PER_TOKEN + TOKENS_PER_IMAGE * len(sample.images))
        self._names.append(tuple(name for name in sample.images if isinstance(name, str)))
        self.text_only |= not sample.images
        self.repeated += sample.id in self._seen
        self._seen[sample.id] = index
        if self._split == "test":
            first = self._questions.setdefault((sample.id, sample.turns), index)
            try:
                self._metric.check(sample.reference, sample.extra)
            except ValueError as error:
                raise place.error(
                    "`answer`", f"cannot be scored by {self._name}: {error}", "Correct the row or the metric."
                ) from error
            if first != index:
                raise replace(place, id=sample.id).error(
                    "`question_id`",
                    f"repeats {sample.id!r} of row {first + 1}, with the same question",
                    "Remove one of the rows or number them anew: a prediction belongs to one row.",
                )

    def images_exist(self, images: ImageFolder, keep: np.ndarray, key: str) -> None:
        """Raise for the first image in use that is nowhere, and say how many there are."""
        listings: dict[str, frozenset[str]] = {}
        absent = [
            (int(row), name, path)
            for row in keep
            for name in self._names[row]
            if isinstance(name, str) and (path := images.missing(name, listings)) is not None
        ]
        self._names.clear()
        if absent:
            row, name, path = absent[0]
            others = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
            raise Place(self.source, self._key, row).error(
                "`image`",
                f"names {name!r}, but there is no file {path}{others}",
                f"Correct {key} or data.root ({self._root}), or add the images.",
            )


def _subsample(data: DataConfig, count: int, split: Split, seed: int, task: str) -> np.ndarray:
    """Row numbers in use, ascending. Smaller samples are parts of larger ones."""
    wanted = count
    if split == "train":
        if not 0 < data.fraction <= 1:
            raise ValueError(f"data.fraction is {data.fraction}. It must be above 0 and at most 1.")
        wanted = max(1, round(count * data.fraction))
    limit: int | None = getattr(data, f"limit_{split}")
    if limit is not None:
        if limit < 1:
            raise ValueError(f"data.limit_{split} is {limit}. It must be at least 1, or null for no limit.")
        wanted = min(wanted, limit)
    if wanted == count:
        return np.arange(count)
    generator = torch.Generator().manual_seed(derive_seed(seed, "subsample", task, split))
    return np.sort(torch.randperm(count, generator=generator).numpy()[:wanted])
