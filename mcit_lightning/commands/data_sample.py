"""`mcit-lightning data sample EXPERIMENT --rows N --out DIR`: a small part of an experiment's data that can be run."""

import argparse
from pathlib import Path

from mcit_lightning.commands import PROGRAM, add_experiment
from mcit_lightning.commands.numbers import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment, how much of it, and where to."""
    add_experiment(parser)
    parser.add_argument(
        "--rows", type=at_least(1), required=True, metavar="N", help="at most so many rows of every split"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder for them")


def command(options: argparse.Namespace) -> int:
    """Write the part and say how to run it.

    Raises:
        ValueError: the experiment, its data or an option is wrong.
        OSError: the folder cannot be written.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from mcit_lightning.commands.prepared import load_prepared
    from mcit_lightning.loading import find_experiment
    from mcit_lightning.subset import SPLITS, write_subset

    config = load_prepared(options)
    written = write_subset(config, find_experiment(options.experiment), options.overrides, options.rows, options.out)
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("task", no_wrap=True)
    for split in SPLITS:
        table.add_column(split, justify="right")
    for task in config.order:
        table.add_row(Text(task), *(str(written.rows.get((task, split), "")) for split in SPLITS))
    console.print(table)
    outside = f"; {written.outside} outside of data.root are named by their own path" if written.outside else ""
    console.print(f"{written.pictures} pictures copied{outside}")
    console.print(f"{PROGRAM} {written.file}", style="bold")
    return 0
