"""The report's part on the router: where samples went, which ones were left to the pretrained model, and how that changed."""

from typing import Any

from mcit_lightning.evaluation.formatting import number_text
from mcit_lightning.evaluation.page import chart, heat_cell, heat_row, heat_table, section
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.routing import NOWHERE
from mcit_lightning.evaluation.svg import Line


def routing_section(results: Results) -> str:
    """Confusion after the last stage, accuracy over the stages and rejections; empty for a strategy without a router."""
    if results.routing is None:
        return ""
    return section(
        "Routing",
        f"Share of a task's samples (row, percent) that were routed to each task (column) first, after the last stage. "
        f"{_sentences(results.routing)}",
        _confusion(results, results.routing["confusion"]),
        _over_stages(results),
        _rejections(results),
    )


def _sentences(routing: dict[str, Any]) -> str:
    """The numbers of the last stage; an older file has the accuracy alone."""
    text = [f"Right for {number_text(routing['accuracy'])} % of the samples of learnt tasks."]
    experts = list(routing.get("experts", {}).values())
    if any(count > 1 for count in experts):
        text.append(
            f"Their own task is among those that were used for {number_text(routing.get('among'))} %; "
            f"a sample used {number_text(sum(experts) / len(experts), digits=2)} tasks' experts on the mean over tasks."
        )
    return " ".join(text)


def _confusion(results: Results, confusion: dict[str, dict[str, int]]) -> str:
    found = {routed for counts in confusion.values() for routed in counts}
    columns = [*(task for task in results.tasks if task in found), *sorted(found - set(results.tasks))]
    rows = []
    for task, counts in confusion.items():
        total = sum(counts.values())
        cells = (100 * counts[name] / total if counts.get(name) else None for name in columns)
        rows.append(
            heat_row(
                task, "".join(heat_cell(cell, own=name == task) for name, cell in zip(columns, cells, strict=True))
            )
        )
    names = ["None (pretrained)" if name == NOWHERE else name for name in columns]
    return heat_table("Samples of", names, rows)


def _over_stages(results: Results) -> str:
    """Curves of the accuracy and of the mean rejection of learnt and of other tasks, from the second stage on."""
    assert results.routing is not None
    accuracy: dict[str, float | None] = results.routing.get("per_stage", {})
    if len(accuracy) < 2:
        return ""
    lines = [Line("Right", 0, list(accuracy.values()))]
    if any_rejected(results):
        rejected = [_mean_rejected(results, stage) for stage in accuracy]
        lines += [
            Line("Rejected: old", 6, [learnt for learnt, _ in rejected]),
            Line("Rejected: new", 2, [other for _, other in rejected]),
        ]
    hints = [f"after stage {number} ({stage})" for number, stage in enumerate(accuracy, start=1)]
    ticks = [str(number) for number in range(1, len(accuracy) + 1)]
    title = "Share of samples that were routed right after each stage"
    also = (
        "; rejected: share of the samples that got the pretrained model, as a mean over the tasks learnt so far (old) and "
        "over the others (new)"
    )
    return (
        f'<h3>Over the stages</h3><p class="soft">Percent of the samples of learnt tasks that were routed right'
        f"{also if len(lines) > 1 else ''}.</p>{chart(lines, ticks, hints, title=title, height=220)}"
    )


def any_rejected(results: Results) -> bool:
    """Whether some sample of some stage was left to the pretrained model."""
    stages = (results.routing or {}).get("rejected_per_stage", {})
    return any(share for tasks in stages.values() for share in tasks.values())


def _mean_rejected(results: Results, stage: str) -> tuple[float | None, float | None]:
    """Mean rejection (percent) of the tasks learnt up to a stage, and of the others."""
    assert results.routing is not None
    learnt = _learnt_after(results, stage)
    shares: dict[str, float] = results.routing.get("rejected_per_stage", {}).get(stage, {})
    parts = [[share for task, share in shares.items() if (task in learnt) == known] for known in (True, False)]
    known, other = (sum(own) / len(own) if own else None for own in parts)
    return known, other


def _learnt_after(results: Results, stage: str) -> list[str]:
    row = next((entry.row for entry in results.cost if entry.stage == stage), -1)
    return results.tasks[: row + 1]


def _rejections(results: Results) -> str:
    """Share of every task's samples that no router knew, after each stage."""
    assert results.routing is not None
    stages: dict[str, dict[str, float]] = results.routing.get("rejected_per_stage", {})
    if not stages:
        return ""
    head = "<h3>Left to the pretrained model</h3>"
    if not any_rejected(results):
        return f'{head}<p class="soft">No sample, after any stage.</p>'
    columns = [task for task in results.tasks if any(task in shares for shares in stages.values())]
    rows = []
    for stage, shares in stages.items():
        newest = _learnt_after(results, stage)[-1:]
        cells = "".join(heat_cell(shares.get(task), own=task in newest) for task in columns)
        rows.append(heat_row(stage, cells))
    new = any(task not in _learnt_after(results, stage) for stage, shares in stages.items() for task in shares)
    reading = (
        "Left of and under the bold cells are learnt tasks, where a low share is wanted; right of them tasks that were not "
        "learnt yet, where a high one is."
        if new
        else "All of these tasks were learnt, so a low share is wanted; <code>evaluate: all</code> also shows tasks before "
        "they are learnt."
    )
    return (
        f'{head}<p class="soft">Percent of a task\'s samples (column) that no router knew, after each stage (row). '
        f"{reading}</p>{heat_table('After learning', columns, rows)}"
    )
