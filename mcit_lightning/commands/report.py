"""`mcit-lightning report RUN [RUN ...]`: write the page of a run again, from what is in its directory."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcit_lightning.evaluation.results import Results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run directories."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="a run directory, finished or not; its report.html is replaced",
    )


def command(options: argparse.Namespace) -> int:
    """Write every page anew and say where it is; nothing is written if a directory is no run.

    Raises:
        ValueError: a directory holds no run, or its files are damaged.
        OSError: a page cannot be written.
    """
    from rich.console import Console

    from mcit_lightning.commands.pictures import TestPictures
    from mcit_lightning.evaluation.report import write_report

    console = Console(highlight=False, soft_wrap=True, markup=False)
    loaded = [(root, load_run(root), *read_settings(root)) for root in options.runs]
    for root, results, text, settings in loaded:
        try:
            page = write_report(root, results, text, TestPictures(settings))
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(
                f"{root}: its results.json, config.yaml or predictions are not as a run writes them "
                f"({type(error).__name__}: {error}). "
                "Restore them from a copy; MCIT_DEBUG=1 shows where"
            ) from error
        console.print(str(page))
    return 0


def load_run(root: Path) -> "Results":
    """The results of a run directory.

    Raises:
        ValueError: it is none, nothing was evaluated yet, or `results.json` is damaged.
    """
    from mcit_lightning.evaluation.results import RESULTS_FILE, Results

    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; name a run directory, for example runs/quickstart")
    if not (root / RESULTS_FILE).is_file():
        if (root / "state.json").is_file():
            raise ValueError(f"{root}: the run has no {RESULTS_FILE} yet, as nothing was evaluated; continue it first")
        inside = sorted(path.parent.name for path in root.glob(f"*/{RESULTS_FILE}"))
        hint = f"; its folder {inside[0]} is one" if inside else ""
        raise ValueError(f"{root}: is no run directory, it holds no {RESULTS_FILE}{hint}")
    return Results.load(root)


def read_settings(root: Path) -> tuple[str, dict[str, Any]]:
    """The text of a run's `config.yaml` and its content; empty if there is none.

    Raises:
        ValueError: it cannot be read.
    """
    import yaml

    path = root / "config.yaml"
    if not path.is_file():
        return "", {}
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.safe_load(text) or {}
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        first = "nested too deeply" if isinstance(error, RecursionError) else str(error).strip().splitlines()[0]
        raise ValueError(f"{path}: cannot be read as YAML ({first}). Restore it from a copy, or remove it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: is no mapping of keys to values. Restore it from a copy, or remove it")
    return text, content
