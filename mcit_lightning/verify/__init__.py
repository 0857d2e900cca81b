"""Check the data of an experiment, without its model: `verify` finds everything that is wrong, not only the first thing."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.check import TOKENS_PER_IMAGE
from mcit_lightning.data.collate import TrainCollator
from mcit_lightning.data.records import Split
from mcit_lightning.data.splits import TaskSplit, open_split
from mcit_lightning.verify.lengths import Lengths, estimate, local_processor, measure
from mcit_lightning.verify.pictures import PictureCheck, Pictures
from mcit_lightning.verify.rows import Survey, data_root, estimated_length, images_folder, survey_split

SPLITS: tuple[Split, ...] = ("train", "val", "test")
Progress = Callable[[str, int], None]
"""Told what is being looked at, and how many pictures were since the last call."""


@dataclass(frozen=True)
class Limits:
    """How thorough a check is.

    Args:
        pictures: decode at most so many of a split; None for all.
        lengths: count the tokens of at most so many samples of a split exactly, the longest by estimate; 0 for none.
        workers: pictures to decode at the same time.
    """

    pictures: int | None = None
    lengths: int = 512
    workers: int = 4


@dataclass
class SplitCheck:
    """What was found in a split.

    Args:
        survey: its rows.
        pictures: their pictures.
        used: rows that the run uses after `data.fraction` and `data.limit_*`; None where it would refuse the split.
        lengths: tokens of the samples; None without any sample, and for a test split, whose prompts are never cut.
        problems: a line for everything that makes a run refuse the split or end in its middle.
        notes: a line for what a run accepts but its reader may want to know.
    """

    survey: Survey
    pictures: Pictures
    used: int | None = None
    lengths: Lengths | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What was found in an experiment's data.

    Args:
        checks: split by split, in the order of the stream.
        general: what concerns all of them, for example why token lengths are estimated.
    """

    checks: list[SplitCheck] = field(default_factory=list)
    general: list[str] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """All problems, in the order of the stream."""
        return [problem for check in self.checks for problem in check.problems]


def verify(config: ExperimentConfig, limits: Limits, progress: Progress | None = None) -> Report:
    """Look at every row and picture of every split that the experiment names.

    Args:
        config: the experiment.
        limits: how thorough to be.
        progress: is told of the progress.

    Raises:
        ValueError: the prompt template does not fit the backbone's processor.
    """
    report = Report()
    collator = _collator(config, report) if limits.lengths else None
    pictures = PictureCheck(limits.workers, limits.pictures)
    for task in config.order:
        for split in SPLITS:
            if getattr(config.tasks[task], split):
                report.checks.append(_check(config, task, split, pictures, collator, limits, progress))
    return report


def _collator(config: ExperimentConfig, report: Report) -> TrainCollator | None:
    try:
        processor = local_processor(config.backbone)
    except ValueError as error:
        report.general.append(f"token lengths are estimated: {error}")
        return None
    return TrainCollator(processor, config.prompt, max_length=config.data.max_length)


def _check(
    config: ExperimentConfig,
    task: str,
    split: Split,
    pictures: PictureCheck,
    collator: TrainCollator | None,
    limits: Limits,
    progress: Progress | None,
) -> SplitCheck:
    own, label = config.tasks[task], f"{task} {split}"

    def tick(count: int) -> None:
        if progress is not None:
            progress(label, count)

    tick(0)
    survey = survey_split(config, task, split)
    opened, refusal = (None, survey.fault) if survey.fault else _open(config, task, split)
    in_use = None
    if opened is not None and len(opened) < len(survey.entries):
        in_use = {sample.row for sample in opened}
    key, _ = images_folder(own, task, split)
    found = pictures.check(survey, in_use, key, str(data_root(config)), tick)
    check = SplitCheck(survey, found, None if opened is None else len(opened))
    if split != "test":
        check.lengths = _lengths(config, check, opened, collator, limits.lengths)
    _judge(check, own.malformed == "skip", refusal)
    return check


def _open(config: ExperimentConfig, task: str, split: Split) -> tuple[TaskSplit | None, str | None]:
    """The split as a run opens it, or why a run would refuse it."""
    try:
        return open_split(config.data, task, config.tasks[task], split, config.seed), None
    except ValueError as error:
        return None, str(error)


def _lengths(
    config: ExperimentConfig, check: SplitCheck, opened: TaskSplit | None, collator: TrainCollator | None, limit: int
) -> Lengths | None:
    survey, without = check.survey, check.pictures.bad_rows
    lengths = np.asarray(survey.lengths if opened is None else opened.lengths)
    if len(lengths) == 0:
        return None
    if collator is None:
        return estimate(lengths, config.data.max_length)
    if opened is not None:
        return measure(opened.__getitem__, lengths, collator, limit=limit, without=without)
    samples = [survey.sample(row, parts) for row, parts in survey.drawn]
    drawn = np.asarray([estimated_length(parts) for _, parts in survey.drawn])
    return measure(samples.__getitem__, drawn, collator, limit=limit, without=without)


def _judge(check: SplitCheck, skip_malformed: bool, refusal: str | None) -> None:
    """Sort what was found into problems and notes."""
    survey, pictures, lengths = check.survey, check.pictures, check.lengths
    check.problems += [] if survey.fault is None else [survey.fault]
    (check.notes if skip_malformed else check.problems).extend([*survey.broken, *survey.repeated])
    check.problems += [*pictures.missing, *pictures.unreadable]
    check.problems += [] if lengths is None else lengths.faults
    if refusal is not None and not check.problems:
        check.problems.append(refusal)
    where = f"{survey.source} ({survey.key})"
    if survey.repeated_ids:
        check.notes.append(f"{where}: repeated ids: {survey.repeated_ids:,} of {survey.rows:,}")
    if lengths is not None and lengths.over:
        how = (
            f"of the {lengths.measured:,} counted"
            if lengths.measured
            else f"by an estimate of {TOKENS_PER_IMAGE} a picture"
        )
        dropped = f"; {lengths.dropped:,} have no answer token left and would not train" if lengths.dropped else ""
        check.notes.append(f"{where}: longer than data.max_length: {lengths.over:,} samples {how}{dropped}")
