"""`mcit-lightning report RUN [RUN ...]`: the page of a run from what is in its directory, or a comparison of several runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcit_lightning.comparison.find import Run
    from mcit_lightning.evaluation.samples import ImageOf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run directories."""
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="one run directory, finished or not: its report.html is replaced. Several, or a folder of them such as a sweep's: "
        "the finished ones are compared",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="where the comparison goes: comparison.html, tables, tensorboard/ (the folder of runs if one is named, "
        "else runs/comparison)",
    )  # fmt: skip
    parser.add_argument(
        "--reference", metavar="METHOD", help="what the others are compared with (sequential if there, else the best)"
    )
    parser.add_argument(
        "--each", action="store_true", help="replace the report.html of every run instead of comparing them"
    )


def command(options: argparse.Namespace) -> int:
    """Write every page anew and say where it is; nothing is written if a directory is no run.

    Raises:
        ValueError: a directory holds no run, or its files are damaged.
        OSError: a page cannot be written.
    """
    from rich.console import Console

    from mcit_lightning.evaluation.open_run import STATE_FILE
    from mcit_lightning.evaluation.results import RESULTS_FILE

    console = Console(highlight=False, soft_wrap=True, markup=False)
    roots: list[Path] = options.runs
    folders = [
        root for root in roots if root.is_dir() and not any((root / f).exists() for f in (RESULTS_FILE, STATE_FILE))
    ]
    if options.each or (len(roots) == 1 and not folders):
        if options.out or options.reference:
            raise ValueError("--out and --reference: are for a comparison; name several runs, or a folder of them")
        _rewrite(roots, console)
        return 0
    out = options.out or (folders[0] if len(roots) == 1 else Path("runs/comparison"))
    compare(roots, out, options.reference, console)
    return 0


def _rewrite(roots: Sequence[Path], console: Any) -> None:
    """Write the page of every run."""
    from mcit_lightning.commands.pictures import TestPictures
    from mcit_lightning.evaluation.open_run import load_run, read_settings
    from mcit_lightning.evaluation.report import write_report

    loaded = [(root, load_run(root), *read_settings(root)) for root in roots]
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


def compare(paths: Sequence[Path], out: Path, reference: str | None, console: Any) -> None:
    """Write a comparison of the finished runs at `paths`, show its table, and say where it is.

    Raises:
        ValueError: a path holds no run, or none is finished.
        OSError: the files cannot be written.
    """
    import logging

    from mcit_lightning.commands.pictures import TestPictures
    from mcit_lightning.comparison.tables import terminal_tables
    from mcit_lightning.comparison.write import write_comparison

    found: dict[Path, ImageOf] = {}

    def pictures(run: "Run") -> "ImageOf":
        return found.setdefault(run.folder, TestPictures(run.config))

    comparison, page = write_comparison(paths, out, pictures, reference=reference)
    for notice in comparison.notices:
        logging.getLogger(__name__).warning("%s", notice)
    for table in terminal_tables(comparison):
        console.print(table)
    console.print(str(page))
