"""What rank zero shows in the terminal after each stage."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mcit_lightning.evaluation.colours import css, ink, score_colour
from mcit_lightning.evaluation.formatting import bytes_text, count_text, number_text, seconds_text
from mcit_lightning.evaluation.results import CostRow, Results

WIDTH = 80
"""Columns that a terminal has at least."""


def stage_table(results: Results) -> Group:
    """The accuracy matrix so far with coloured cells, the summaries below it, and the cost of the last stage.

    Summaries and cost fit `WIDTH` columns."""
    parts: list[RenderableType] = [_matrix(results), _summary(results)]
    if retained := results.held_out.retention(results.matrix.last_row()):
        parts.append(_lines({f"held out: {task}": text for task, text in retained.items()}))
    if cost := [entry for entry in results.cost if entry.row == results.matrix.last_row()]:
        parts.append(_cost(cost[-1]))
    return Group(*parts)


def _matrix(results: Results) -> Table:
    table = Table(
        title=f"{results.experiment} ({results.strategy})",
        title_justify="left",
        box=None,
        padding=(0, 1),
        pad_edge=False,
    )
    table.add_column("after", style="dim", no_wrap=True)
    for task in results.tasks:
        table.add_column(Text(task), justify="right", no_wrap=True)
    if results.zero_shot is not None:
        table.add_row("zero-shot", *(_cell(score) for score in results.zero_shot))
    for row in results.matrix.filled_rows():
        scores = results.matrix.scores[row]
        table.add_row(Text(results.row_name(row)), *(_cell(score, bold=row == n) for n, score in enumerate(scores)))
    return table


def _cell(score: float | None, *, bold: bool = False) -> Text:
    if score is None:
        return Text("")
    colour = score_colour(score)
    return Text(f" {score:5.1f} ", style=f"{'bold ' if bold else ''}{css(ink(colour))} on {css(colour)}")


def _summary(results: Results) -> Text:
    values = {name: number_text(value, digits=2) for name, value in results.summary.items() if value is not None}
    return _lines(values, style="bold")


def _cost(cost: CostRow) -> Text:
    before = {"probe": cost.proxy_seconds, "router": cost.router_seconds}
    values = {
        "trainable": count_text(cost.trainable_params),
        "stored": count_text(cost.stored_params),
        **{name: seconds_text(value) for name, value in before.items() if value is not None},
        "training": seconds_text(cost.train_seconds),
        "evaluation": seconds_text(cost.eval_seconds),
        "peak memory": bytes_text(cost.peak_memory_bytes),
    }
    return _lines(values)


def _lines(values: dict[str, str], style: str = "") -> Text:
    """Names and values on as few lines as fit, none broken between a name and its value."""
    lines: list[Text] = []
    for name, value in values.items():
        pair = Text.assemble((f"{name} ", "dim"), (value, style))
        if lines and len(lines[-1]) + 2 + len(pair) <= WIDTH:
            lines[-1].append("  ").append_text(pair)
        else:
            lines.append(pair)
    return Text("\n").join(lines)
