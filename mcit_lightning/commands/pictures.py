"""The pictures of a finished run's test rows, found by its configuration, as far as they are still there."""

import logging
import os
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from mcit_lightning.config import TaskConfig
from mcit_lightning.data.coco import is_object, read_coco
from mcit_lightning.data.hf import read_dataset
from mcit_lightning.data.images import ImageFolder
from mcit_lightning.data.readers import Rows, file_format, read_file
from mcit_lightning.data.records import Place, parse_parts

logger = logging.getLogger(__name__)


class TestPictures:
    """Finds the first picture of a test row, for the report. Reads a test file when it is asked for one of its rows.

    A task whose file, or a row of it, cannot be read any more has no pictures and is warned of once.

    Args:
        settings: the run's resolved configuration.
    """

    __test__ = False
    """It is no test class, whatever pytest thinks of its name."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        data, self._settings = settings.get("data"), settings.get("tasks")
        root = str(data.get("root", ".")) if isinstance(data, Mapping) else "."
        self._root = Path(os.path.abspath(os.path.expanduser(root)))
        self._tasks: dict[str, TaskConfig] = {}
        self._rows: dict[str, Rows | None] = {}

    def __call__(self, task: str, index: int) -> Path | Image.Image | None:
        try:
            if task not in self._rows:
                self._rows[task] = None
                self._rows[task] = self._open(task)
            rows = self._rows[task]
            return None if rows is None or index >= len(rows) else self._picture(task, rows, index)
        except (ValueError, OSError) as error:
            logger.warning("%s: samples are shown without pictures: %s", task, error)
            self._rows[task] = None
            return None

    def _picture(self, task: str, rows: Rows, index: int) -> Path | Image.Image | None:
        place = Place(rows.source, f"tasks.{task}.test", index)
        # only the images are wanted: an answer that is in a file of references need not be there
        parts = parse_parts(rows.row(index), place, split="test", find_reference=_no_answer)
        if not parts.images:
            return None
        image, config = parts.images[0], self._tasks[task]
        folder = config.images if config.test_images is None else config.test_images
        return Path(ImageFolder(str(self._root), folder).path(image)) if isinstance(image, str) else image.open()

    def _open(self, task: str) -> Rows:
        config, key = self._task(task), f"tasks.{task}.test"
        if not config.test:
            raise ValueError(f"{key}: config.yaml names no file")
        self._tasks[task] = config
        return self._read(config, config.test, key)

    def _task(self, task: str) -> TaskConfig:
        """What the configuration says of a task; nothing, if it does not name it.

        Raises:
            ValueError: it is not what a configuration says of a task.
        """
        values = self._settings.get(task) if isinstance(self._settings, Mapping) else None
        known = {entry.name for entry in fields(TaskConfig)}
        try:
            own = {str(key): value for key, value in (values or {}).items() if key in known}
            config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), own))
        except (AttributeError, OmegaConfBaseException, ValueError, TypeError) as error:
            raise ValueError(f"tasks.{task}: config.yaml is not as a run writes it") from error
        assert isinstance(config, TaskConfig)
        return config

    def _read(self, config: TaskConfig, name: str, key: str) -> Rows:
        kind = file_format(name, config.format, key)
        path = self._root / name.partition("@")[0]
        if kind == "hf":
            if not path.exists():  # a report must not download anything
                raise ValueError(f"{key}: {path} does not exist, and datasets are not loaded from the hub for a report")
            return read_dataset(name, self._root, config.columns, key, "test", _ignore)
        path = self._root / name
        if kind == "json" and path.is_file() and is_object(path):
            return read_coco(path, key, "test", _ignore)
        return read_file(path, kind, key, _ignore, _ignore)


def _ignore(index: int, row: Any) -> None:
    """Rows are not looked at while the file is read."""


def _no_answer(identity: str, number: int) -> tuple[Any, dict[str, Any]]:
    return None, {}
