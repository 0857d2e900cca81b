"""A small part of an experiment's data, on the disk in the same formats, with an experiment file that runs on it."""

import logging
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from mcit_lightning.aliases import find_task
from mcit_lightning.composition import compose
from mcit_lightning.config import DataConfig, ExperimentConfig
from mcit_lightning.data.records import Sample, Split
from mcit_lightning.data.splits import open_split
from mcit_lightning.evaluation.files import check_new_folder, write_atomic
from mcit_lightning.loading import experiments_dir
from mcit_lightning.subset.sources import Target, write_references, write_split
from mcit_lightning.verify.rows import data_root

logger = logging.getLogger(__name__)

SPLITS: tuple[Split, ...] = ("train", "val", "test")


@dataclass
class Subset:
    """What was written.

    Args:
        file: the experiment file.
        rows: (task, split) -> rows.
        pictures: picture files that were copied.
        outside: pictures that lie outside `data.root`; they are named by their own path and were not copied.
    """

    file: Path
    rows: dict[tuple[str, Split], int]
    pictures: int
    outside: int


def write_subset(config: ExperimentConfig, source: Path, overrides: Iterable[str], rows: int, out: Path) -> Subset:
    """Write a part of every split of an experiment.

    The rows are drawn from those that the experiment uses, with its seed; a smaller part is contained in a larger one.

    Args:
        config: the experiment, with the overrides.
        source: its file, or the composition that names it.
        overrides: `key=value` strings; the new experiment file has them too.
        rows: at most so many of each split.
        out: a folder that does not exist yet, or is empty.

    Raises:
        ValueError: `out` is in use, or the data are not as they should be.
        OSError: `out` cannot be written.
    """
    out = Path(os.path.abspath(out.expanduser()))
    check_new_folder(out)
    data, root = _limited(config.data, rows), data_root(config)
    target, written = Target(out), Subset(out / f"{config.name}_sample.yaml", {}, 0, 0)
    changed: dict[str, dict[str, Any]] = {}
    files: set[Path] = set()
    for task in config.order:
        own = config.tasks[task]
        for split in SPLITS:
            if not getattr(own, split):
                continue
            samples = list(open_split(data, task, own, split, config.seed))
            numbers = [sample.row for sample in samples]
            names: dict[str, str] = {split: write_split(own, task, split, root, numbers, target)}
            if split == "test" and (references := write_references(own, task, root, numbers, target)):
                names["references"] = references
            changed.setdefault(task, {}).update({k: v for k, v in names.items() if v != getattr(own, k)})
            if split in own.published_rows:  # a part is meant to be shorter
                changed[task].setdefault("published_rows", {})[split] = len(samples)
            files |= _pictures(samples)
            written.rows[task, split] = len(samples)
    for file in files:
        if file.is_relative_to(root):
            place = out / file.relative_to(root)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            written.pictures += 1
        else:
            written.outside += 1
    tasks = {task: names for task, names in changed.items() if names}
    write_atomic(written.file, _experiment(config, source, list(overrides), out, tasks, rows))
    return written


def _limited(data: DataConfig, rows: int) -> DataConfig:
    def lower(limit: int | None) -> int:
        return rows if limit is None else min(rows, limit)

    train, val, test = lower(data.limit_train), lower(data.limit_val), lower(data.limit_test)
    return replace(data, limit_train=train, limit_val=val, limit_test=test)


def _pictures(samples: Sequence[Sample]) -> set[Path]:
    return {Path(image) for sample in samples for image in sample.images if isinstance(image, str)}


def _experiment(
    config: ExperimentConfig, source: Path, overrides: list[str], out: Path, tasks: dict[str, Any], rows: int
) -> str:
    """The experiment file: the original one, its overrides, and what differs."""
    given = [_with_own_name(override, config) for override in overrides]
    composed = compose(str(source), experiments_dir())
    changes: dict[str, Any] = {
        "base": str(source.resolve())
        if composed is None
        else [str(file.resolve()) for file in composed.files.values()],
        "name": f"{config.name}_sample",
        "prepare": None,  # it would write the whole data over the part
        "data": {"root": str(out), "fraction": 1.0},
    }
    if composed is not None and composed.strategy is not None:
        changes["strategy"] = {"name": composed.strategy}
    model = Path(config.backbone.id).expanduser()
    if model.is_dir():  # it may be named relative to the data or to the current folder
        changes["backbone"] = {"id": os.path.abspath(model)}
    if tasks:
        changes["tasks"] = tasks
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.from_dotlist(given), changes))
    assert isinstance(merged, dict)
    merged = {key: merged[key] for key in ("base", "name", *(k for k in merged if k not in ("base", "name")))}
    head = f"# At most {rows} rows of every split of {config.name}, written by `mcit-lightning data sample`.\n"
    return head + yaml.safe_dump(merged, sort_keys=False, allow_unicode=True)


def _with_own_name(override: str, config: ExperimentConfig) -> str:
    """An override whose task goes by the name that it has in the file."""
    key, _, value = override.partition("=")
    parts = key.split(".")
    if parts[0] == "tasks" and len(parts) > 1:
        parts[1] = find_task(parts[1], config.tasks) or parts[1]
    return f"{'.'.join(parts)}={value}"
