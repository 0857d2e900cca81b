"""The embedded default: a small real vision-language model and six tasks of real pictures, made offline.

Everything comes out of installed Python packages (`packages.py` names them); nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mcit_lightning.quickstart.cache import build_once
from mcit_lightning.quickstart.packages import installed_versions

if TYPE_CHECKING:
    from mcit_lightning.quickstart.layout import Task

__all__ = ["TASKS", "prepare"]

REVISION = 3
"""Raise it when the code would write something else from the same packages and options."""

TASKS = ("digits", "textures", "emoji", "charts", "icons", "flags")


def prepare(
    root: Path, *, seed: int = 0, train: int = 480, val: int = 40, test: int = 100, language_layers: int | None = None
) -> None:
    """Write the model to `root/model` and the six tasks beside it, once.

    A later call only checks the files against `root/manifest.json` and writes them anew if they differ, or if they
    were made with other options or package versions. Several processes may call it at the same time.

    Args:
        root: The folder to fill, usually below the user's cache folder.
        seed: Decides which pictures are drawn and how they are placed.
        train: Training samples per task.
        val: Validation samples per task.
        test: Test samples per task.
        language_layers: Cut the language model down to its first layers and its last, this many in all, for runs that
            must be cheap; None keeps all 30. Give each depth a `data.root` of its own.

    Raises:
        ValueError: The language model does not have that many layers.
        ModuleNotFoundError: A package of the quickstart is missing; the message has the command to install it.
    """
    counts = {"train": train, "val": val, "test": test}
    options = {"seed": seed, "counts": counts, "language_layers": language_layers}
    fingerprint = {"what": "quickstart", "revision": REVISION, **options, "packages": installed_versions()}
    build_once(Path(root), fingerprint, lambda folder: _build(folder, counts, seed, language_layers))


def _build(folder: Path, counts: Mapping[str, int], seed: int, language_layers: int | None) -> None:
    from mcit_lightning.quickstart.layout import write_tasks
    from mcit_lightning.quickstart.model import write_model

    write_tasks(folder, _tasks(counts, seed))
    write_model(folder / "model", seed, language_layers)


def _tasks(counts: Mapping[str, int], seed: int) -> Iterator[Task]:
    from mcit_lightning.quickstart import charts, emoji, icons, photos
    from mcit_lightning.quickstart.model import IMAGE_SIZE

    builders = {
        "digits": photos.digits,
        "textures": photos.textures,
        "emoji": emoji.kinds,
        "charts": charts.charts,
        "icons": icons.icons,
        "flags": emoji.flags,
    }
    for name in TASKS:
        yield builders[name](IMAGE_SIZE, counts, seed)
