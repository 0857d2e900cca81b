"""One pass over the rows of a split that does not stop at what is wrong, but writes it down."""

import json
import os
import random
from array import array
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mcit_lightning.config import ExperimentConfig, TaskConfig
from mcit_lightning.data.check import CHARACTERS_PER_TOKEN, TOKENS_PER_IMAGE
from mcit_lightning.data.coco import is_object, read_coco
from mcit_lightning.data.hf import read_dataset
from mcit_lightning.data.images import ImageFolder, Listings
from mcit_lightning.data.readers import Rows, check_file, file_format, read_file
from mcit_lightning.data.records import FindReference, ImageSource, Parts, Place, Sample, Split, parse_parts
from mcit_lightning.data.references import References, read_references
from mcit_lightning.evaluation.metrics import AnswerMetric, task_metric
from mcit_lightning.evaluation.text import clean

DRAWN = 200
"""Rows of a split that are kept whole, to show some of them."""


class Entry(NamedTuple):
    """What is remembered of a row: its 0-based number, its id and its images as the row names them."""

    row: int
    id: str
    images: tuple[ImageSource, ...]


@dataclass
class Survey:
    """What the rows of a split are.

    Args:
        task: name of the task.
        split: which split.
        key: the configuration key of the file.
        source: the file or dataset.
        folder: where the images are.
    """

    task: str
    split: Split
    key: str
    source: str
    folder: ImageFolder
    rows: int = 0
    """Rows of the file, broken ones included."""
    fault: str | None = None
    """What ended the reading, or why it could not begin; the rows before it count."""
    broken: list[str] = field(default_factory=list)
    """A message for each row that is not as its format asks, or whose answer cannot be scored."""
    repeated: list[str] = field(default_factory=list)
    """A message for each test row that asks an earlier row's question under the same id."""
    repeated_ids: int = 0
    """Rows whose id an earlier row has; published training files repeat ids."""
    entries: list[Entry] = field(default_factory=list)
    """The rows that are as they should be, in order."""
    lengths: array = field(default_factory=lambda: array("i"))
    """Estimated tokens of each entry."""
    answers: Counter[str] = field(default_factory=Counter)
    """How often each answer occurs, without case, outer blanks and a final full stop."""
    drawn: list[tuple[int, Parts]] = field(default_factory=list)
    """A seeded random sample of the rows, whole, with their numbers."""

    def missing(self) -> Iterator[tuple[Entry, str]]:
        """Entries and the path at which one of their images was looked for, for every image that is nowhere."""
        listings: Listings = {}
        for entry in self.entries:
            for name in entry.images:
                if isinstance(name, str) and (path := self.folder.missing(name, listings)) is not None:
                    yield entry, path

    def sample(self, row: int, parts: Parts) -> Sample:
        """A row that was kept whole, with the paths of its images."""
        images = tuple(self.folder.path(image) if isinstance(image, str) else image for image in parts.images)
        return Sample(parts.id, self.task, images, parts.turns, parts.reference, parts.extra, self.source, row)

    def place(self, entry: Entry) -> Place:
        """Where an entry stands."""
        return Place(self.source, self.key, entry.row, entry.id)


def survey_split(config: ExperimentConfig, task: str, split: Split) -> Survey:
    """Read every row of a split.

    Args:
        config: the experiment.
        task: name of the task.
        split: which split; the task names a file for it.
    """
    own = config.tasks[task]
    key, name = f"tasks.{task}.{split}", str(getattr(own, split))
    root = data_root(config)
    survey = Survey(task, split, key, str(root / name), ImageFolder(str(root), images_folder(own, task, split)[1]))
    try:
        references = None
        if split == "test" and own.references is not None:
            references = read_references(root / own.references, f"tasks.{task}.references")
        surveyor = Surveyor(survey, own, None if references is None else references.find, config.seed)
        rows = _read(own, name, root, key, split, surveyor)
        survey.source = rows.source
        survey.fault = _fault(rows, key, references, f"tasks.{task}.references")
    except ValueError as error:
        survey.fault = str(error)
    return survey


def images_folder(own: TaskConfig, task: str, split: Split) -> tuple[str, str]:
    """The configuration key that names a split's folder of images, and the folder."""
    if split == "test" and own.test_images is not None:
        return f"tasks.{task}.test_images", own.test_images
    return f"tasks.{task}.images", own.images


def data_root(config: ExperimentConfig) -> Path:
    """`data.root` as an absolute path."""
    return Path(os.path.abspath(os.path.expanduser(config.data.root)))


def answer_text(reference: Any) -> str:
    """An answer to read: of several the most frequent one."""
    if isinstance(reference, str):
        return reference
    if isinstance(reference, list) and reference and all(isinstance(item, str) for item in reference):
        return Counter(reference).most_common(1)[0][0]
    return json.dumps(reference, ensure_ascii=False, default=str)


def estimated_length(parts: Parts) -> int:
    """Tokens of a row, as the sampler estimates them."""
    characters = sum(len(text) for _, text in parts.turns)
    return characters // CHARACTERS_PER_TOKEN + TOKENS_PER_IMAGE * len(parts.images)


class Surveyor:
    """Sees every row while the file is read, and notes it in a `Survey`.

    Args:
        survey: to be filled.
        config: the task's configuration.
        find_reference: answers that are in a file of their own.
        seed: of the rows that are kept whole.
    """

    def __init__(
        self, survey: Survey, config: TaskConfig, find_reference: FindReference | None = None, seed: int = 0
    ) -> None:
        self._survey = survey
        self._metric = _metric(config, survey.task) if survey.split == "test" else None
        self._metric_name = config.metric
        self._find_reference = find_reference
        self._ids: set[str] = set()
        self._questions: dict[int, int] = {}
        self._random = random.Random(f"{seed}/{survey.key}")

    def __call__(self, index: int, row: Any) -> None:
        """Note a row."""
        survey = self._survey
        survey.rows += 1
        place = Place(survey.source, survey.key, index)
        try:
            parts = parse_parts(row, place, split=survey.split, find_reference=self._find_reference)
        except ValueError as error:
            survey.broken.append(str(error))
            return
        place = place._replace(id=parts.id)
        if self._metric is not None:
            try:
                self._metric.check(parts.reference, parts.extra)
            except Exception as error:  # the metric may be the user's own
                what = f"cannot be scored by {self._metric_name}: {error}"
                survey.broken.append(str(place.error("`answer`", what, "Correct the row or the metric.")))
                return
            self._compare(index, place, parts)
        survey.repeated_ids += parts.id in self._ids
        self._ids.add(parts.id)
        self._keep(index, parts)

    def skip(self, index: int, error: ValueError) -> None:
        """Note a row that is no JSON."""
        self._survey.rows += 1
        self._survey.broken.append(str(error))

    def _compare(self, index: int, place: Place, parts: Parts) -> None:
        first = self._questions.setdefault(hash((parts.id, parts.turns)), index)
        if first != index:
            what = f"repeats {parts.id!r} of row {first + 1}, with the same question"
            remedy = "Remove one of the rows or number them anew: a prediction belongs to one row."
            self._survey.repeated.append(str(place.error("`question_id`", what, remedy)))

    def _keep(self, index: int, parts: Parts) -> None:
        survey = self._survey
        survey.entries.append(Entry(index, parts.id, parts.images))
        survey.lengths.append(estimated_length(parts))
        if survey.split == "test":
            survey.answers[clean(answer_text(parts.reference))] += 1
        else:
            survey.answers.update(clean(text) for role, text in parts.turns if role == "assistant")
        if len(survey.drawn) < DRAWN:
            survey.drawn.append((index, parts))
        elif (slot := self._random.randrange(len(survey.entries))) < DRAWN:
            survey.drawn[slot] = (index, parts)


def _metric(config: TaskConfig, task: str) -> AnswerMetric:
    try:
        return task_metric(config)
    except ValueError as error:  # for example a package that it needs is not installed
        raise ValueError(f"tasks.{task}.metric: {error}") from error


def _read(config: TaskConfig, name: str, root: Path, key: str, split: Split, surveyor: Surveyor) -> Rows:
    kind = file_format(name, config.format, key)
    if kind == "hf":
        return read_dataset(name, root, config.columns, key, split, surveyor)
    path = root / name
    check_file(path, key)
    if kind == "json" and is_object(path):
        return read_coco(path, key, split, surveyor)
    return read_file(path, kind, key, surveyor, surveyor.skip)


def _fault(rows: Rows, key: str, references: References | None, references_key: str) -> str | None:
    if len(rows) == 0:
        return f"{rows.source} ({key}) holds no rows. Give the task at least one, or take it out of `order`."
    if references is not None and references.by_line and len(references) != len(rows):
        return (
            f"{references_key}: {references.source} has {len(references)} images, but {rows.source} has {len(rows)} rows; "
            "the n-th image belongs to the n-th row. Use the two files of one release."
        )
    return None
