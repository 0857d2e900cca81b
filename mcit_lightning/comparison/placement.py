"""The page's parts on experts under a budget: how they were split between the towers, and where they went."""

from collections.abc import Mapping
from html import escape

from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.methods import Group, Method
from mcit_lightning.comparison.shares import ShareRow, share_bars
from mcit_lightning.comparison.statistics import estimate
from mcit_lightning.evaluation.formatting import number_text
from mcit_lightning.evaluation.module_map import TOWER_NAMES, Cell, ModuleMap, columns_text, draw_map
from mcit_lightning.evaluation.page import section
from mcit_lightning.evaluation.placement import TowerModules, experts, tower_modules

HALF = 480
"""Width of a drawing that has another one beside it."""


def modality_section(group: Group, gallery: Gallery) -> str:
    """How the experts of each task were split between the towers; empty without a method that has a budget."""
    parts = []
    for method in _budgeted(group):
        rows = [_split(method, stage) for stage in method.runs[0].results.allocation]

        def draw(width: int, rows: list[ShareRow] = rows, name: str = method.name) -> str:
            return share_bars(rows, width=width, title=f"Experts of {name} in each tower")

        drawn = gallery.add_sizes(f"order{group.number}/modality/{method.name}", draw, wide=HALF)
        parts.append(f"<div><h3>{escape(method.name)}</h3>{drawn}</div>")
    if not parts:
        return ""
    keys = "".join(f'<span><i class="{tower}"></i>{text.lower()}</span>' for tower, text in TOWER_NAMES.items())
    return section(
        "Modality split",
        "Share of each task's experts in the two towers, mean over the seeds. Behind the bar: the vision tower's share, ± its "
        "standard deviation.",
        f'<div class="key">{keys}</div><div class="pairs">{"".join(parts)}</div>',
    )


def placement_section(group: Group, gallery: Gallery) -> str:
    """Which module got an expert for which task, in how many seeds; empty without a method that has a budget."""
    parts = []
    for method in _budgeted(group):
        if not (towers := tower_modules(method.runs[0].results)):
            continue
        parts.append(f"<h3>{escape(method.name)}</h3>")
        for modules in towers:
            drawn = _map(method, modules)
            name = f"order{group.number}/placement/{method.name}/{modules.tower}"
            about = f"{TOWER_NAMES[modules.tower]}. {columns_text(modules)}"
            parts.append(f'<p class="soft small">{about}</p>{gallery.add(name, drawn.picture, shown=drawn.html)}')
    if not parts:
        return ""
    return section(
        "Placement of experts",
        "Which module (column) got an expert for which task (row). The fuller the colour, the more seeds put one there.",
        *parts,
    )


def _budgeted(group: Group) -> list[Method]:
    return [method for method in group.ranked() if all(run.results.allocation for run in method.runs)]


def _split(method: Method, stage: str) -> ShareRow:
    """Mean shares of a stage's experts over the seeds."""
    shares: dict[str, list[float | None]] = {tower: [] for tower in TOWER_NAMES}
    for run in method.runs:
        budget: Mapping[str, int] = run.results.allocation.get(stage, {}).get("budget", {})
        total = sum(budget.values())
        for tower, own in shares.items():
            own.append(100 * budget.get(tower, 0) / total if total else None)
    means = {tower: found for tower, own in shares.items() if (found := estimate(own)) is not None}
    vision = means.get("vision")
    text = "" if vision is None else f"{number_text(vision.mean, digits=0)} %"
    if vision is not None and vision.deviation is not None:
        text += f" ± {number_text(vision.deviation, digits=0)}"
    title = ", ".join(f"{TOWER_NAMES[tower]} {number_text(own.mean)} %" for tower, own in means.items())
    return ShareRow(stage, [(tower, own.mean / 100) for tower, own in means.items()], text, f"{stage}: {title}")


def _map(method: Method, modules: TowerModules) -> ModuleMap:
    """A map of a tower over all seeds."""
    decided = [experts(run.results, modules) for run in method.runs]
    rows: list[tuple[str, list[Cell | None]]] = []
    for stage in decided[0]:
        cells: list[Cell | None] = []
        for path in modules.paths:
            ranks = [rank for own in decided if stage in own and (rank := own[stage][path].rank) is not None]
            about = f"expert in {len(ranks)} of {len(decided)} seeds" if len(decided) > 1 else "expert"
            about = f"{about}, rank {' or '.join(map(str, sorted(set(ranks))))}" if ranks else "no expert"
            title = f"{modules.short(path)}, {stage}: {about}"
            cells.append(Cell(modules.tower if ranks else "", title, share=len(ranks) / len(decided) if ranks else 1.0))
        rows.append((stage, cells))
    layers = [(label, len(own)) for label, own in modules.layers]
    title = f"{method.name}, {TOWER_NAMES[modules.tower]}: which module got an expert for which task"
    return draw_map(layers, rows, title=title, style=modules.tower)
