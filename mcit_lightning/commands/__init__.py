"""The commands of `mcit-lightning`. Each is a module with `add_arguments(parser)` and `command(options) -> exit status`.

A command's module is imported when the command is named, and imports what is slow (torch, transformers) when it runs, so that
every `--help` answers at once.
"""

import argparse
import importlib
from collections.abc import Sequence
from dataclasses import dataclass

from mcit_lightning import __version__
from mcit_lightning.registry import nearest

PROGRAM = "mcit-lightning"


@dataclass(frozen=True)
class Command:
    """A command line that starts with `words`.

    Args:
        words: what follows the program's name; nothing for the command that runs an experiment.
        module: dotted path of the module.
        usage: what follows the words, for the list of commands.
        help: one line.
        example: a whole command line, without the program's name.
    """

    words: tuple[str, ...]
    module: str
    usage: str
    help: str
    example: str

    @property
    def name(self) -> str:
        """The words with the program's name before them."""
        return " ".join((PROGRAM, *self.words))

    def parser(self) -> argparse.ArgumentParser:
        """The command's own parser."""
        text = self.help[0].upper() + self.help[1:] + "."
        parser = argparse.ArgumentParser(
            prog=self.name,
            description=text,
            epilog=_overview() if not self.words else f"example: {PROGRAM} {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        importlib.import_module(self.module).add_arguments(parser)
        if not self.words:
            parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
        return parser

    def run(self, options: argparse.Namespace) -> int:
        """Carry the command out; see its module for what it raises."""
        status: int = importlib.import_module(self.module).command(options)
        return status


RUN = Command(
    (),
    "mcit_lightning.commands.run",
    "EXPERIMENT [key=value ...]",
    "train and evaluate a sequence of tasks; the same command continues an interrupted run",
    "quickstart strategy.rank=4 order=[flags,digits] out=runs/trial",
)
COMMANDS = (
    RUN,
    Command(
        ("data", "verify"),
        "mcit_lightning.commands.data_verify",
        "EXPERIMENT [key=value ...]",
        "check every row and picture of an experiment's tasks, without the model",
        "data verify my_benchmark order=[charts] --out checked",
    ),
    Command(
        ("data", "sample"),
        "mcit_lightning.commands.data_sample",
        "EXPERIMENT --rows N --out DIR",
        "write a few rows of every task, their pictures and an experiment file that runs on them",
        "data sample my_benchmark --rows 8 --out small",
    ),
    Command(
        ("score",),
        "mcit_lightning.evaluation.rescore",
        "PREDICTIONS --metric NAME",
        "score predictions that a run, or another tool, has written, without the model",
        "score runs/quickstart/predictions/stage_06/flags.jsonl --metric exact_match",
    ),
    Command(
        ("report",),
        "mcit_lightning.commands.report",
        "RUN [RUN ...]",
        "write a run's report.html again from its own files, or compare several runs: a page, tables, TensorBoard",
        "report runs/sweep_quickstart --reference sequential",
    ),
    Command(
        ("sweep",),
        "mcit_lightning.commands.sweep",
        "EXPERIMENT|PLAN [key=value ...]",
        "run several strategies, task orders and seeds, and compare them; the same command continues it",
        "sweep quickstart strategies=sequential,dmole seeds=0,1,2 orders=2 --jobs 2",
    ),
    Command(
        ("chat",),
        "mcit_lightning.commands.chat",
        "RUN --image FILE",
        "ask a trained model about pictures, and see where it routes the question",
        'chat runs/quickstart --image flag.png --ask "Which country has this flag?"',
    ),
    Command(
        ("export",),
        "mcit_lightning.commands.export",
        "RUN --to peft|merged --out DIR",
        "write a trained run as PEFT adapters, or as a model with merged weights",
        "export runs/dmole_quickstart --to peft --out adapters",
    ),
)


def find_command(arguments: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that a command line names, and the arguments after its words.

    Raises:
        ValueError: the first word is a command's, but the second is not; names the nearest.
    """
    for command in COMMANDS[1:]:
        if tuple(arguments[: len(command.words)]) == command.words:
            return command, list(arguments[len(command.words) :])
    group = arguments[0] if arguments else ""
    seconds = [command.words[1] for command in COMMANDS if len(command.words) > 1 and command.words[0] == group]
    if not seconds:
        return RUN, list(arguments)
    given = arguments[1] if len(arguments) > 1 else ""
    raise ValueError(f"{PROGRAM} {group}: no command {given!r}. {nearest(given, seconds)} See {PROGRAM} --help.")


def add_experiment(parser: argparse.ArgumentParser) -> None:
    """The arguments that name an experiment and change its keys."""
    parser.add_argument(
        "experiment",
        metavar="EXPERIMENT",
        help="a YAML file, the name of an experiment that comes with the package, or llava7b+ucit+dmole",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="takes precedence over the file")


def _overview() -> str:
    lines = ["commands:"]
    for command in COMMANDS:
        lines += [f"  {command.name} {command.usage}", f"      {command.help}"]
    lines += ["", "examples:", *(f"  {PROGRAM} {command.example}" for command in COMMANDS)]
    return "\n".join([*lines, f"  {PROGRAM} quickstart dry_run=true", f"  {PROGRAM} data verify --help"])
