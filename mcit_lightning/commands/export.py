"""`mcit-lightning export RUN --to peft|merged --out DIR`: a trained run for other libraries."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Run, format, and which part of the run."""
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument(
        "--to",
        choices=("peft", "merged"),
        required=True,
        help="peft: adapter folders for PeftModel.from_pretrained; merged: a whole model for AutoModelForImageTextToText",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--stage", metavar="NAME", help="the model after this stage; the last trained one by default")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME",
        help="with merged: which adapter, where the run has several (D-MoLE: a task, given twice for two; BranchLoRA: a task)",
    )


def command(options: argparse.Namespace) -> int:
    """Write the export and say where it is.

    Raises:
        ValueError: no run, no such stage or adapter, or one that the format cannot hold.
        OSError: the folder cannot be written.
    """
    from rich.console import Console

    from mcit_lightning.commands.quiet import quiet_libraries
    from mcit_lightning.export import export_merged, export_peft
    from mcit_lightning.trained import load_trained

    if options.adapter and options.to == "peft":
        raise ValueError("--adapter: goes with --to merged; --to peft writes every adapter of the run")
    quiet_libraries()
    trained = load_trained(options.run_folder, options.stage)
    if options.to == "peft":
        folders = export_peft(trained, options.out)
    else:
        folders = [export_merged(trained, options.out, options.adapter)]
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for folder in folders:
        console.print(str(folder))
    return 0
