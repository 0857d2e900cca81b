"""The page's part on routers: where the samples of each task went, and how that changed."""

from collections import Counter
from html import escape

from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.heat import HeatCell, heat_map
from mcit_lightning.comparison.methods import Group, Method
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.page import legend, section
from mcit_lightning.evaluation.routing import NOWHERE
from mcit_lightning.evaluation.svg import Line, line_chart


def routing_section(group: Group, gallery: Gallery) -> str:
    """Confusion of every router over all seeds, and accuracies over the stages; empty without a router."""
    routed = [method for method in group.ranked() if all(run.results.routing for run in method.runs)]
    if not routed:
        return ""
    maps = "".join(
        f"<div><h3>{escape(method.name)}</h3>"
        f"{gallery.add(f'order{group.number}/router/{method.name}', _confusion(method, group.tasks))}</div>"
        for method in routed
    )
    return section(
        "Router confusion",
        "Percent of a task's samples (row) that were routed first to each task (column) after the last stage, all seeds "
        "together. None: left to the pretrained model.",
        f'<div class="tiled">{maps}</div>',
        _over_stages(group, routed, gallery),
    )


def _confusion(method: Method, tasks: list[str]) -> str:
    counts: dict[str, Counter[str]] = {}
    for run in method.runs:
        assert run.results.routing is not None
        for task, routes in run.results.routing["confusion"].items():
            counts.setdefault(task, Counter()).update(routes)
    found = {name for routes in counts.values() for name in routes}
    columns = [*(task for task in tasks if task in found), *sorted(found - set(tasks))]
    rows: list[tuple[str, list[HeatCell | None]]] = []
    for task in [task for task in tasks if task in counts]:
        total = counts[task].total()
        cells: list[HeatCell | None] = [
            HeatCell(
                100 * counts[task][name] / total,
                f"{counts[task][name]} of {total} samples of {task} to {name}",
                name == task,
            )
            if counts[task][name]
            else None
            for name in columns
        ]
        rows.append((task, cells))
    names = ["None" if name == NOWHERE else name for name in columns]
    return heat_map(rows, names, title=f"Router confusion of {method.name}")


def _accuracy(method: Method, stage: str) -> Estimate | None:
    """Mean over the seeds of the router's accuracy after a stage."""
    return method.estimate(lambda run: (run.results.routing or {}).get("per_stage", {}).get(stage))


def _over_stages(group: Group, routed: list[Method], gallery: Gallery) -> str:
    """Accuracy of the routers after each stage, mean over the seeds."""
    lines = []
    for method in routed:
        found = [_accuracy(method, stage) for stage in group.tasks]
        values = [None if own is None else own.mean for own in found]
        if any(value is not None for value in values):
            lines.append(Line(method.name, method.style, values))
    if not lines or len(group.tasks) < 2:
        return ""
    ticks = [str(number) for number in range(1, len(group.tasks) + 1)]
    hints = [f"after stage {number} ({stage})" for number, stage in enumerate(group.tasks, start=1)]

    def draw(width: int) -> str:
        wide, title = width > 600, "Router accuracy after each stage"
        height = max(220, 24 + 17 * len(lines))
        return line_chart(lines, ticks, hints, width=width, height=height, labels=wide, title=title)

    names = legend([(line.name, line.style) for line in lines])
    drawn = gallery.add_sizes(f"order{group.number}/router_accuracy", draw, below=names)
    why = "Percent of the samples of learnt tasks that were routed to their own task first, mean over the seeds."
    return f'<h3>Over the stages</h3><p class="soft">{why}</p>{drawn}'
