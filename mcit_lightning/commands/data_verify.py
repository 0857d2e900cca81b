"""`mcit-lightning data verify EXPERIMENT`: check every row and picture of an experiment's tasks, without the model."""

import argparse
import os
from pathlib import Path

from mcit_lightning.commands import add_experiment
from mcit_lightning.commands.numbers import at_least


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment, where to write, and how thorough to be."""
    add_experiment(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="for contact sheets and the list of problems (runs/NAME_data)"
    )
    parser.add_argument(
        "--images", type=at_least(0), metavar="N", help="decode at most N pictures of a split (all); all are looked for"
    )
    parser.add_argument(
        "--lengths", type=at_least(0), default=512, metavar="N",
        help="count the tokens of the N longest samples of a split exactly (%(default)s); 0 only estimates",
    )  # fmt: skip
    parser.add_argument(
        "--samples", type=at_least(1), default=12, metavar="N", help="samples of a split on a sheet (%(default)s)"
    )
    parser.add_argument("--font", type=Path, metavar="FILE", help="font for the sheets, for scripts that are not Latin")
    parser.add_argument(
        "--workers", type=at_least(1), default=min(16, os.cpu_count() or 1), metavar="N",
        help="pictures to decode at the same time (%(default)s here)",
    )  # fmt: skip
    parser.epilog = f"{parser.epilog}\nexit status: 0 nothing is wrong, 1 problems were found, 2 bad input"


def command(options: argparse.Namespace) -> int:
    """Check, draw, and show what was found.

    Returns:
        0 if nothing is wrong, 1 if there are problems.

    Raises:
        ValueError: the experiment or an option is wrong.
        OSError: the output cannot be written.
    """
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn

    from mcit_lightning.commands.prepared import load_prepared
    from mcit_lightning.evaluation.files import write_atomic
    from mcit_lightning.verify import Limits, verify
    from mcit_lightning.verify.sheet import contact_sheet
    from mcit_lightning.verify.tables import findings, listing, report_tables

    config = load_prepared(options)
    console = Console(highlight=False, soft_wrap=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}: {task.completed:.0f} pictures"),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        line = bar.add_task("")
        seen = {"label": ""}

        def progress(label: str, count: int) -> None:
            if label != seen["label"]:
                seen["label"] = label
                bar.reset(line, description=label)
            bar.advance(line, count)

        limits = Limits(pictures=options.images, lengths=options.lengths, workers=options.workers)
        report = verify(config, limits, progress)
    out = (options.out or Path("runs") / f"{config.name}_data").absolute()
    for task in config.order:
        surveys = [check.survey for check in report.checks if check.survey.task == task]
        subtitle = f"{config.name}, scored by {config.tasks[task].metric}"
        sheet = contact_sheet(task, subtitle, surveys, samples=options.samples, font=options.font)
        out.mkdir(parents=True, exist_ok=True)
        sheet.save(out / f"{task}.png")
    write_atomic(out / "problems.txt", listing(report))
    console.print(report_tables(report, config))
    console.print(findings(report, str(out / "problems.txt")))
    problems = len(report.problems)
    console.print(f"{problems or 'no'} problem{'' if problems == 1 else 's'}; contact sheets in {out}")
    return 1 if problems else 0
