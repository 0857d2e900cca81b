"""What of an experiment's data and model is on this machine, and what is missing where."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from mcit_lightning.config import DataConfig, ExperimentConfig, TaskConfig
from mcit_lightning.data.records import Split
from mcit_lightning.dry_run.skeleton import has_weights, is_path
from mcit_lightning.verify.rows import Survey, data_root, images_folder, survey_split

SPLITS: tuple[Split, ...] = ("train", "val", "test")
KEY_ENCODER = "key_encoder"
"""Hyper-parameter of BranchLoRA that names a model beside the backbone."""


@dataclass
class Inventory:
    """The rows that there are, and what there is not.

    Args:
        rows: (task, split) -> usable rows of the file, for every file that is there.
        used: (task, split) -> how many of them the run uses; of a file that is not there, how many of its published rows.
        missing: (configuration key, where it should be), one for each file or folder.
        broken: (configuration key of a file, what is wrong with its rows).
    """

    rows: dict[tuple[str, Split], int] = field(default_factory=dict)
    used: dict[tuple[str, Split], int] = field(default_factory=dict)
    missing: list[tuple[str, str]] = field(default_factory=list)
    broken: list[tuple[str, str]] = field(default_factory=list)

    @property
    def estimated(self) -> set[tuple[str, Split]]:
        """Splits of which the published number of rows is all that is known."""
        return self.used.keys() - self.rows.keys()

    def lack(self, key: str, what: str) -> None:
        """Note something missing, once, under the first key that names it."""
        if all(what != noted for _, noted in self.missing):
            self.missing.append((key, what))


def take_inventory(config: ExperimentConfig) -> Inventory:
    """Count the rows of the files that are there and list what is not. No picture is opened, nothing is written."""
    found = Inventory()
    if not has_weights(config.backbone.id, config.backbone.revision):
        found.lack("backbone.id", _model(config, config.backbone.id))
    encoder = config.strategy.get(KEY_ENCODER)
    if encoder is not None and not has_weights(encoder):
        found.lack(f"strategy.{KEY_ENCODER}", _model(config, encoder))
    root = data_root(config)
    if config.prepare is not None and not root.exists():
        found.lack("data.root", f"{root}: written by {config.prepare['_target_']} when the run starts")
        return found
    for task in config.order:
        own = config.tasks[task]
        for split in SPLITS:
            if getattr(own, split):
                _split(config, task, own, split, found)
    return found


def rows_in_use(data: DataConfig, usable: int, split: Split) -> int:
    """Rows that `data.fraction` and `data.limit_*` leave, as `open_split` draws them."""
    wanted = max(1, round(usable * data.fraction)) if split == "train" else usable
    limit: int | None = getattr(data, f"limit_{split}")
    return wanted if limit is None else min(wanted, limit)


def _split(config: ExperimentConfig, task: str, own: TaskConfig, split: Split, found: Inventory) -> None:
    key, name, root = f"tasks.{task}.{split}", str(getattr(own, split)), data_root(config)
    if split in own.published_rows:
        found.used[task, split] = rows_in_use(config.data, own.published_rows[split], split)
    path = root / (name.partition("@")[0] if own.format == "hf" else name)
    if own.format == "hf" and not path.exists():
        found.lack(key, f"{name}: not below {root}; read from the hub when the run starts")
        return
    needed = {key: path}
    if split == "test" and own.references is not None:
        needed[f"tasks.{task}.references"] = root / own.references
    absent = {wanted: file for wanted, file in needed.items() if not file.exists()}
    if absent:
        for wanted, file in absent.items():
            found.lack(wanted, str(file))
        images, folder = images_folder(own, task, split)
        if folder and not (root / folder).is_dir():
            found.lack(images, f"{root / folder}{os.sep}")
        return
    found.used.pop((task, split), None)
    survey = survey_split(config, task, split)
    wrong = len(survey.broken) + len(survey.repeated)
    if survey.fault is not None or wrong:
        found.broken.append((key, survey.fault or f"{wrong:,} of {survey.rows:,} rows are broken"))
    if survey.fault is None and wrong < survey.rows:
        found.rows[task, split] = survey.rows - wrong
        found.used[task, split] = rows_in_use(config.data, survey.rows - wrong, split)
        for line in _pictures(survey):
            found.lack(images_folder(own, task, split)[0], line)


def _pictures(survey: Survey) -> list[str]:
    """A line for each folder in which pictures of the split's rows are missing."""
    folders: dict[Path, set[str]] = {}
    for _, path in survey.missing():
        folders.setdefault(Path(path).parent, set()).add(Path(path).name)
    return [
        f"{folder}: {len(names):,} pictures of the {survey.split} rows, for example {min(names)}"
        for folder, names in folders.items()
    ]


def _model(config: ExperimentConfig, name: str) -> str:
    if config.prepare is not None and Path(name).is_relative_to(config.data.root):
        return f"{name}: written by {config.prepare['_target_']} when the run starts"
    if is_path(name):
        return f"{os.path.abspath(Path(name).expanduser())}: put a saved model with its processor there"
    return f"{name}: not in the hub's cache; downloaded when the run starts, or give the folder of a copy"
