"""The page's part on frozen branches: which froze after which task, and which later tasks used them most again."""

from html import escape

from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.heat import HeatCell, heat_map
from mcit_lightning.comparison.methods import Group, Method
from mcit_lightning.evaluation.formatting import number_text
from mcit_lightning.evaluation.module_map import TOWER_NAMES, columns_text
from mcit_lightning.evaluation.page import section
from mcit_lightning.evaluation.placement import branches, tower_modules
from mcit_lightning.evaluation.report_freezing import freezing_map, stage_legend


def freezing_section(group: Group, gallery: Gallery) -> str:
    """Shares of the branches over all seeds, and maps of the first seed; empty if nothing froze."""
    parts = []
    for method in group.ranked():
        if not all(run.results.freezing and run.results.modules for run in method.runs):
            continue
        first = method.runs[0].results
        name = f"order{group.number}/freezing/{method.name}"
        shares = gallery.add(f"{name}/shares", _shares(method))
        parts.append(
            f'<h3>{escape(method.name)}</h3><div class="scroll">{shares}</div>{stage_legend(list(first.freezing))}'
        )
        parts += _maps(method, name, gallery)
    if not parts:
        return ""
    return section(
        "Frozen branches and their reuse",
        "Table: percent of all branches, mean over the seeds, that froze after a task (first column), and that a later task used "
        "most again although they were frozen (a branch counts once for each such task). Map: the branches of the first seed, "
        "coloured by the task after which they froze; a dot has the colour of the last task that used the branch again.",
        *parts,
    )


def _shares(method: Method) -> str:
    """Rows: after which task branches froze; columns: how many, and who used them again."""
    stages = list(method.runs[0].results.freezing)
    fates = [[branch for own in branches(run.results).values() for branch in own.values()] for run in method.runs]

    def percent(stage: str | None, again: str | None = None) -> float:
        counts = (
            sum(b.frozen == stage and (again is None or again in b.again) for b in own) / max(1, len(own))
            for own in fates
        )
        return 100 * sum(counts) / len(fates)

    rows: list[tuple[str, list[HeatCell | None]]] = []
    for number, stage in enumerate(stages):
        share = percent(stage)
        cells: list[HeatCell | None] = [
            HeatCell(share, f"{number_text(share)} % of the branches froze after {stage}", True)
        ]
        for place, later in enumerate(stages[1:], start=1):
            again = percent(stage, later)
            title = f"{number_text(again)} % of the branches froze after {stage} and were used most again by {later}"
            cells.append(HeatCell(again, title) if place > number else None)
        rows.append((stage, cells))
    left = percent(None)
    rows.append(
        (
            "still tunable",
            [HeatCell(left, f"{number_text(left)} % of the branches never froze", True), *[None] * (len(stages) - 1)],
        )
    )
    columns = ["frozen", *(f"again in {stage}" for stage in stages[1:])]
    title = f"Branches of {method.name}: when they froze, and who used them again"
    return heat_map(rows, columns, title=title, widest=150)


def _maps(method: Method, name: str, gallery: Gallery) -> list[str]:
    """A map per tower, of the first seed."""
    results = method.runs[0].results
    parts = []
    for modules in tower_modules(results):
        drawn = freezing_map(results, modules, about=f"{method.name}, ")
        if drawn is not None:
            about = f"{TOWER_NAMES[modules.tower]}, seed {results.seed}. {columns_text(modules)}"
            figure = gallery.add(f"{name}/{modules.tower}", drawn.picture, shown=drawn.html)
            parts.append(f'<p class="soft small">{about}</p>{figure}')
    return parts
