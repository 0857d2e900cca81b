"""The report's table of tasks that were never trained."""

from html import escape

from mcit_lightning.evaluation.formatting import NONE, number_text
from mcit_lightning.evaluation.page import line_table, section
from mcit_lightning.evaluation.results import Results


def held_out_section(results: Results) -> str:
    """A row per stage with the score of every held-out task and its change; empty where there are none."""
    tasks = list(results.held_out.metrics)
    if not tasks or not results.held_out.scores:
        return ""
    before = results.held_out.row(0)
    rows = []
    for stage, scores in sorted(results.held_out.scores.items()):
        cells = []
        for task in tasks:
            change = f" ({number_text(scores[task] - before[task], signed=True)})" if stage and task in before else ""
            cells.append(f"{number_text(scores[task])}{change}" if task in scores else NONE)
        rows.append(("Before training" if stage == 0 else results.row_name(stage - 1), cells))
    why = (
        "Scores on tasks that are never trained, in percent, and their change against the pretrained model: what the sequence "
        "costs in general ability."
    )
    heads = [f"{escape(task)} ({escape(results.held_out.metrics[task])})" for task in tasks]
    return section("Held-out tasks", why, line_table(["Stage", *heads], rows))
