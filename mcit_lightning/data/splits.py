"""One split of one task: checked from end to end when it is opened, read row by row afterwards."""

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mcit_lightning.config import DataConfig, TaskConfig
from mcit_lightning.data.check import RowCheck
from mcit_lightning.data.coco import is_object, read_coco
from mcit_lightning.data.hf import read_dataset
from mcit_lightning.data.images import ImageFolder
from mcit_lightning.data.readers import Rows, check_file, file_format, read_file
from mcit_lightning.data.records import FindReference, Place, Sample, Split, parse_row
from mcit_lightning.data.references import References, read_references
from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.evaluation.metrics import AnswerMetric, task_metric

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
        skipped: malformed rows, which are not in use.
        find_reference: answers of a test split that are in a file of their own.
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
        skipped: int = 0,
        find_reference: FindReference | None = None,
    ) -> None:
        self.task = task
        self.split = split
        self.lengths = lengths
        self.total = len(rows)
        """Rows in the file, of which `len(self)` are used."""
        self.skipped = skipped
        """Rows in the file that are malformed and left out."""
        self.text_only = text_only
        """Some row of the file has no image."""
        self._rows = rows
        self._keep = keep
        self._images = images
        self._key = key
        self._find_reference = find_reference

    def __len__(self) -> int:
        return len(self._keep)

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        row = int(self._keep[index])
        place = Place(self._rows.source, self._key, row)
        sample = parse_row(
            self._rows.row(row), place, task=self.task, split=self.split, find_reference=self._find_reference
        )
        paths = tuple(self._images.path(image) if isinstance(image, str) else image for image in sample.images)
        return replace(sample, images=paths)


def open_split(data: DataConfig, task: str, config: TaskConfig, split: Split, seed: int) -> TaskSplit:
    """Read and check one split.

    Every row of the file is parsed and the images of all rows in use must exist, so that no row can end a run in its
    middle. A malformed row is refused or, with `malformed: skip`, left out, counted and reported. Training ids may repeat,
    because published files repeat them. A test split may not ask the same question under the same `question_id` twice;
    one `question_id` with different questions (TextVQA's ids are image ids) is accepted.

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
    references = _references(config, Path(root), task) if split == "test" else None
    check = RowCheck(
        split,
        key,
        metric=_metric(config, task) if split == "test" else None,
        metric_name=config.metric,
        find_reference=None if references is None else references.find,
        skip_malformed=config.malformed == "skip",
    )
    rows = _read(config, name, Path(root), key, split, check)
    if len(rows) == 0:
        raise ValueError(f"{rows.source} ({key}) holds no rows. Give the task at least one, or take it out of `order`.")
    if references is not None and references.by_line and len(references) != len(rows):
        raise ValueError(
            f"tasks.{task}.references: {references.source} has {len(references)} images, but {rows.source} has {len(rows)} "
            "rows; the n-th image belongs to the n-th row. Use the two files of one release."
        )
    usable = check.finish(rows)
    _compare_with_published(rows.source, len(rows), config.published_rows.get(split))
    keep = _subsample(data, usable, split, seed, task)
    folder_key = "test_images" if split == "test" and config.test_images is not None else "images"
    images = ImageFolder(root, getattr(config, folder_key))
    check.images_exist(images, keep, f"tasks.{task}.{folder_key}", root)
    return TaskSplit(
        task,
        split,
        rows,
        keep=keep,
        lengths=check.lengths_of(keep),
        images=images,
        key=key,
        text_only=check.text_only,
        skipped=len(rows) - len(usable),
        find_reference=None if references is None else references.find,
    )


def _metric(config: TaskConfig, task: str) -> AnswerMetric:
    try:
        return task_metric(config)
    except ValueError as error:
        raise ValueError(f"tasks.{task}.metric: {error}") from error


def _references(config: TaskConfig, root: Path, task: str) -> References | None:
    return None if config.references is None else read_references(root / config.references, f"tasks.{task}.references")


def _read(config: TaskConfig, name: str, root: Path, key: str, split: Split, check: RowCheck) -> Rows:
    kind = file_format(name, config.format, key)
    if kind == "hf":
        check.source = name
        return read_dataset(name, root, config.columns, key, split, check)
    if config.columns:
        raise ValueError(
            f"{key.rsplit('.', 1)[0]}.columns is set, but {key} ({name}) is read as {kind}, whose keys are fixed. Remove "
            f"`columns`, or set {key.rsplit('.', 1)[0]}.format to hf."
        )
    path = root / name
    check.source = str(path)
    check_file(path, key)
    if kind == "json" and is_object(path):
        return read_coco(path, key, split, check)
    return read_file(path, kind, key, check, check.unreadable if check.skip_malformed else None)


def _compare_with_published(source: str, count: int, published: int | None) -> None:
    """Another number of rows than the benchmark's authors give, or than the file's name says, is worth knowing."""
    if published is not None:
        if published != count:
            logger.warning("%s: has %d rows; published were %d", source, count, published)
        return
    # published names: train_4w has 40,000 rows, test_3000 has 3,000
    found = re.search(r"_(\d+)([wk]?)(?:\.\w+)?$", Path(source).name)
    if found is None:
        return
    promised = int(found[1]) * {"w": 10_000, "k": 1000, "": 1}[found[2]]
    if promised != count and promised >= 1000 and promised % 100 == 0 and not 1900 < promised < 2100:
        logger.warning("%s: the name says %d rows, the file has %d", source, promised, count)


def _subsample(data: DataConfig, usable: np.ndarray, split: Split, seed: int, task: str) -> np.ndarray:
    """Row numbers in use, ascending, out of the usable ones. Smaller samples are parts of larger ones."""
    count = wanted = len(usable)
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
        return usable
    generator = torch.Generator().manual_seed(derive_seed(seed, "subsample", task, split))
    return usable[np.sort(torch.randperm(count, generator=generator).numpy()[:wanted])]
