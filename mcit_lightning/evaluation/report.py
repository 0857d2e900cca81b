"""One self-contained page about a run: no network, no script, light and dark, readable on a phone."""

from html import escape
from pathlib import Path

from mcit_lightning.evaluation.files import write_atomic
from mcit_lightning.evaluation.formatting import NONE, number_text
from mcit_lightning.evaluation.page import chart, heat_cell, heat_row, heat_table, render_page, section
from mcit_lightning.evaluation.report_budget import budget_section
from mcit_lightning.evaluation.report_cost import cost_section
from mcit_lightning.evaluation.report_freezing import freezing_section
from mcit_lightning.evaluation.report_held_out import held_out_section
from mcit_lightning.evaluation.report_published import published_section
from mcit_lightning.evaluation.report_routing import routing_section
from mcit_lightning.evaluation.report_samples import samples_section
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.samples import ImageOf
from mcit_lightning.evaluation.svg import Line

REPORT_FILE = "report.html"

TILES = {
    "MFN": ("Final (MFN)", "Mean score of the learnt tasks after the last stage.", False),
    "MFT": ("Just learnt (MFT)", "Mean score of every task right after it was learnt: plasticity.", False),
    "BWT": (
        "Backward transfer (BWT)",
        "Mean change of earlier tasks since they were learnt; below zero is forgetting.",
        True,
    ),
    "MAA": ("Average (MAA)", "Mean over the stages of the mean score of the tasks seen so far.", False),
    "forgetting": ("Forgetting", "Mean loss of earlier tasks from their best score; lower is better.", False),
    "FWT": ("Forward transfer (FWT)", "Mean gain over zero-shot just before a task is learnt.", True),
    "BWT_T": ("BWT, divided by T", "Backward transfer as CoIN and BranchLoRA print it.", True),
    "AVG": (
        "All stages (AVG)",
        "Mean over all stages and all tasks, also those not learnt yet, as D-MoLE prints it.",
        False,
    ),
}
"""Key of a summary -> heading, explanation, whether it has a sign; in the order of the page."""


def write_report(root: Path, results: Results, config_yaml: str, image_of: ImageOf | None = None) -> Path:
    """Write `report.html` into a run directory, atomically.

    Args:
        root: the run directory; sample answers are read from its `predictions` folder.
        results: what to report, also of a run that is not finished.
        config_yaml: the resolved configuration, shown as it is.
        image_of: finds the picture of a test row; None shows the samples without pictures.

    Returns:
        The path of the page.
    """
    body = [
        _header(results),
        _matrix(results),
        _curves(results),
        _bars(results),
        published_section(results, config_yaml),
        routing_section(results),
        budget_section(results),
        freezing_section(results),
        held_out_section(results),
        cost_section(results),
        samples_section(root, results, image_of),
        f"<details><summary>Configuration</summary><pre>{escape(config_yaml)}</pre></details>",
    ]
    page = render_page(f"{results.experiment}: {results.strategy}", body)
    path = root / REPORT_FILE
    write_atomic(path, page)
    return path


def _header(results: Results) -> str:
    matrix = results.matrix
    last = matrix.last_row()
    done = 0 if last is None else last + 1
    total = len(results.tasks)
    progress = "finished" if done == total else f"{done} of {total} stages evaluated"
    facts = {
        "Strategy": results.strategy,
        "Backbone": results.backbone,
        "Seed": str(results.seed),
        "Tasks": str(total),
        "State": progress,
    }
    if results.zero_shot is not None and None not in results.zero_shot:
        facts["Zero-shot mean"] = number_text(sum(score or 0.0 for score in results.zero_shot) / total)
    summary = results.summary
    tiles = []
    for key, (heading, why, signed) in TILES.items():
        value = summary[key]
        shown = number_text(value, signed=signed, digits=2)
        tiles.append(
            f'<div class="tile{" none" if value is None else ""}"><dt>{heading}</dt><dd class="value">{shown}</dd>'
            f'<dd class="why">{why}</dd></div>'
        )
    notes = []
    if len(set(results.metrics.values())) > 1:
        kinds = ", ".join(f"{task}: {metric}" for task, metric in results.metrics.items())
        notes.append(f"The means run over different metrics ({kinds}).")
    for task, counts in results.notes.get("data", {}).items():
        if counts.get("shortened") or counts.get("dropped"):
            notes.append(
                f"{task}: {counts.get('shortened', 0)} training samples were shortened and {counts.get('dropped', 0)} dropped."
            )
        left_out = {split: counts.get(f"{split}_malformed", 0) for split in ("train", "val", "test")}
        if any(left_out.values()):
            rows = " and ".join(f"{count} {split} rows" for split, count in left_out.items() if count)
            notes.append(f"{task}: {rows} are malformed and were left out.")
    if any(value is None for value in summary.values()):
        notes.append(
            f"{NONE} marks a value that this run does not define, for example because later tasks were not evaluated."
        )
    return (
        f'<header><h1>{escape(results.experiment)}</h1><dl class="facts">'
        + "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
        + f'</dl><dl class="tiles">{"".join(tiles)}</dl>'
        + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
        + "</header>"
    )


def _matrix(results: Results) -> str:
    before = []
    if results.zero_shot is not None:
        before.append(heat_row("Before training", "".join(heat_cell(score) for score in results.zero_shot)))
    rows = []
    for row in results.matrix.filled_rows():
        scores = enumerate(results.matrix.scores[row])
        cells = "".join(heat_cell(score, own=row == column) for column, score in scores)
        rows.append(heat_row(results.row_name(row), cells))
    return section(
        "Accuracy matrix",
        "Score in percent on each task (column) after each stage (row). Bold: the task just learnt. "
        "Reading down a column shows what later stages did to the task.",
        heat_table("After learning", results.tasks, before, rows),
    )


def _curves(results: Results) -> str:
    stages = results.matrix.filled_rows()
    rows = [results.matrix.scores[row] for row in stages]
    ticks = [str(number) for number in range(1, len(stages) + 1)]
    hints = [f"after stage {number} ({results.row_name(row)})" for number, row in enumerate(stages, start=1)]
    if results.zero_shot is not None:
        rows, ticks, hints = [results.zero_shot, *rows], ["start", *ticks], ["before training", *hints]
    lines = [
        Line(
            name=task,
            style=column,
            values=[row[column] for row in rows],
            solid_from=len(rows) - sum(row >= column for row in stages),
        )
        for column, task in enumerate(results.tasks)
        if any(results.matrix.scores[row][column] is not None for row in stages)
    ]
    if len(rows) < 2:
        return ""
    return section(
        "Forgetting curves",
        "Score of every task after each stage; dotted before the task was learnt.",
        chart(lines, ticks, hints, title="Score of every task after each stage", height=380),
    )


def _bars(results: Results) -> str:
    rows = []
    for task in results.tasks:
        learnt, final = results.matrix.learnt(task), results.matrix.final(task)
        if learnt is None or final is None:
            continue
        change = final - learnt
        kind = "down" if change <= -0.05 else "up" if change >= 0.05 else "soft"
        bars = "".join(
            f'<span class="bar {name}" style="width:{min(max(v, 0), 100):.1f}%"></span>'
            for name, v in (("learnt", learnt), ("final", final))
        )
        rows.append(
            f'<div class="task"><div class="name">{escape(task)}</div><div class="pair">{bars}</div>'
            f'<div class="numbers">{number_text(learnt)} \N{RIGHTWARDS ARROW} {number_text(final)} '
            f'<span class="{kind}">({number_text(change, signed=True)})</span></div></div>'
        )
    if len(rows) < 2:  # nothing was learnt after it
        return ""
    return section(
        "Plasticity and stability",
        "",
        '<div class="key"><span><i class="learnt"></i>just learnt</span>',
        '<span><i class="final"></i>after the last stage</span></div>',
        f'<div class="bars">{"".join(rows)}</div>',
    )
