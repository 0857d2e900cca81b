"""The report's table of tasks that were never trained."""

from html import escape

from mcit_lightning.evaluation.page import line_table, section
from mcit_lightning.evaluation.results import Results


def held_out_section(results: Results) -> str:
    """A row per stage with the score of every held-out task and its change; empty where there are none."""
    tasks = list(results.held_out.metrics)
    if not tasks or not results.held_out.scores:
        return ""
    rows = [
        (
            "Before training" if stage == 0 else results.row_name(stage - 1),
            [results.held_out.text(stage, t) for t in tasks],
        )
        for stage in sorted(results.held_out.scores)
    ]
    why = (
        "Scores on tasks that are never trained, in percent, and their change against the pretrained model: what the sequence "
        "costs in general ability."
    )
    heads = [f"{escape(task)} ({escape(results.held_out.metrics[task])})" for task in tasks]
    return section("Held-out tasks", why, line_table(["Stage", *heads], rows))
