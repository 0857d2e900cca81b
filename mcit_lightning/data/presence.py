"""Are the files there at all? Asked before a model is loaded, which may take a download of many gigabytes."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.readers import check_file
from mcit_lightning.stages import Stage


def require_files(config: ExperimentConfig, stages: Sequence[Stage]) -> None:
    """Refuse a run whose annotation files are not all there. Datasets of the hub, and pictures, are looked for later.

    Args:
        config: the experiment.
        stages: its stages; a task that none of them trains needs its test file only.

    Raises:
        ValueError: files are missing; names the first, how many more there are, and where they can be had.
    """
    missing = [(key, path) for key, path in _files(config, stages) if not path.is_file()]
    if not missing:
        return
    more = f" {len(missing) - 1} more files are missing; dry_run=true lists them." if len(missing) > 1 else ""
    source = f" The files: {config.data.source}." if config.data.source else ""
    key, path = missing[0]
    try:
        check_file(path, key)
    except ValueError as error:
        raise ValueError(f"{error}{more}{source}") from None


def _files(config: ExperimentConfig, stages: Sequence[Stage]) -> Iterator[tuple[str, Path]]:
    root = Path(config.data.root).expanduser().absolute()
    trained = {task for stage in stages for task in stage.train}
    for name in (*config.order, *config.held_out):
        task = config.tasks[name]
        files = (
            {"test": task.test} if name not in trained else {"train": task.train, "val": task.val, "test": task.test}
        )
        for key, file in {**files, "references": task.references}.items():
            if file and (key == "references" or task.format != "hf"):
                yield f"tasks.{name}.{key}", root / file
