"""What a check of the data shows in the terminal, and the file that lists every problem."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.formatting import NONE
from mcit_lightning.verify import Report, SplitCheck
from mcit_lightning.verify.lengths import Lengths

SHOWN = 20
"""Problems, and notes, that the terminal shows."""
FREQUENT = 5
"""Answers that a row of the table names."""
NAMES = 40
"""Columns for them."""
BAD = "bold red"


def report_tables(report: Report, config: ExperimentConfig) -> Group:
    """Rows and pictures, then lengths, then answers; all fit 80 columns."""
    parts: list[RenderableType] = [_rows(report), Text(), _lengths(report, config.data.max_length), Text()]
    parts += [_answers(report), Text()]
    for line in report.general:
        parts.append(Text(line, style="dim"))
    return Group(*parts)


def findings(report: Report, listing: str) -> Group:
    """The first problems and notes, a line each, and where the others are.

    Args:
        report: what was found.
        listing: the file that has all of them.
    """
    notes = [note for check in report.checks for note in check.notes]
    parts: list[RenderableType] = []
    for name, lines, style in (("note", notes, "yellow"), ("problem", report.problems, BAD)):
        for line in lines[:SHOWN]:
            parts.append(Text.assemble((f"{name}: ", style), line))
        if len(lines) > SHOWN:
            parts.append(Text(f"... and {len(lines) - SHOWN} more {name}s, all of them in {listing}", style=style))
    return Group(*parts)


def listing(report: Report) -> str:
    """Every problem and note as text, split by split."""
    lines = list(report.general)
    for check in report.checks:
        for name, found in (("problem", check.problems), ("note", check.notes)):
            lines += [f"{check.survey.key}: {name}: {line}" for line in found]
    return "\n".join([*lines, ""]) if lines else "nothing was found\n"


def _rows(report: Report) -> Table:
    table = _table("rows and pictures")
    for name in ("rows", "in use", "broken", "pictures", "decoded", "missing", "unreadable"):
        table.add_column(name, justify="right", no_wrap=True)
    for check, task in _named(report.checks):
        survey, pictures = check.survey, check.pictures
        used = Text("refused", style=BAD) if check.used is None else _count(check.used)
        table.add_row(
            task,
            survey.split,
            _count(survey.rows),
            used,
            _fault(len(survey.broken) + len(survey.repeated)),
            _count(pictures.files),
            _count(pictures.decoded),
            _fault(len(pictures.missing)),
            _fault(len(pictures.unreadable)),
        )
    return table


def _lengths(report: Report, limit: int) -> Table:
    table = _table("tokens of training samples")
    for name in ("median", "longest", f"over {limit}", "counted"):
        table.add_column(name, justify="right", no_wrap=True)
    for check, task in _named([check for check in report.checks if check.lengths is not None]):
        assert check.lengths is not None
        table.add_row(task, check.survey.split, *_tokens(check.lengths))
    return table


def _tokens(lengths: Lengths) -> tuple[str, str, Text, str]:
    about = "" if lengths.measured else "~"
    median = NONE if lengths.median is None else f"{about}{lengths.median:,}"
    over = Text(f"{about}{lengths.over:,}", style="yellow" if lengths.over else "dim")
    return median, f"{about}{lengths.longest:,}", over, _count(lengths.measured) if lengths.measured else "estimated"


def _answers(report: Report) -> Table:
    table = _table("answers")
    for name in ("different", "majority"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("most frequent", no_wrap=True)
    for check, task in _named(report.checks):
        answers = check.survey.answers
        top = answers.most_common(FREQUENT)
        majority = f"{100 * top[0][1] / answers.total():.1f} %" if top else NONE
        names = Text(", ".join(" ".join(answer.split()) or '""' for answer, _ in top))
        names.truncate(NAMES, overflow="ellipsis")
        table.add_row(task, check.survey.split, _count(len(answers)), majority, names)
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("task", no_wrap=True, overflow="ellipsis", max_width=16)
    table.add_column("split", style="dim")
    return table


def _named(checks: list[SplitCheck]) -> list[tuple[SplitCheck, Text]]:
    """Each split with its task's name where that is a new one."""
    named, before = [], ""
    for check in checks:
        named.append((check, Text(check.survey.task if check.survey.task != before else "")))
        before = check.survey.task
    return named


def _count(number: int) -> str:
    return f"{number:,}"


def _fault(number: int) -> Text:
    return Text(_count(number), style=BAD if number else "dim")
