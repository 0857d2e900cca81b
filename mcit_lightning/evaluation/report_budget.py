"""The report's part on the budget: its split between the towers, and which module got an expert for which task."""

from html import escape
from typing import Any

from mcit_lightning.evaluation.formatting import NONE, amount_text, number_text
from mcit_lightning.evaluation.module_map import TOWER_NAMES, Cell, columns_text, draw_map
from mcit_lightning.evaluation.page import section
from mcit_lightning.evaluation.placement import Expert, TowerModules, experts, times_chosen, tower_modules
from mcit_lightning.evaluation.results import Results


def budget_section(results: Results) -> str:
    """The split per stage and a map per tower; empty for a strategy without a budget."""
    if not results.allocation:
        return ""
    towers = list(next(iter(results.allocation.values()))["ratios"])
    maps = [_placement(results, modules) for modules in tower_modules(results)]
    return section(
        "Budget",
        "How each stage split its experts between the towers. Upper bar: the share that the stage was to have; lower bar: the "
        "experts that it got, which differ where a tower has a floor or no room. Difficulty is the norm of a tower's gradients.",
        _key(towers),
        _split(results, towers),
        *maps,
    )


def _key(towers: list[str]) -> str:
    items = "".join(f'<span><i class="{escape(tower)}"></i>{TOWER_NAMES[tower].lower()}</span>' for tower in towers)
    return f'<div class="key">{items}</div>'


def _split(results: Results, towers: list[str]) -> str:
    """A row per stage: two stacked bars, then share, experts and difficulty of each tower."""
    groups = "".join(f'<th scope="colgroup" colspan="3">{TOWER_NAMES[tower]}</th>' for tower in towers)
    heads = '<th class="first">Share</th>'
    heads = (heads + "<th>Experts</th><th>Difficulty</th>") * len(towers)
    rows = []
    for stage, allocation in results.allocation.items():
        budget = allocation.get("budget", {})
        total = sum(budget.values())
        given = {tower: budget.get(tower, 0) / total if total else 0.0 for tower in towers}
        cells = "".join(_numbers(allocation, tower) for tower in towers)
        bars = _stacked(allocation["ratios"], towers) + _stacked(given, towers)
        rows.append(
            f'<tr><th scope="row">{escape(stage)}</th><td><div class="stacks" aria-hidden="true">{bars}</div></td>{cells}</tr>'
        )
    return (
        f'<div class="scroll"><table class="lines split"><thead><tr><td colspan="2"></td>{groups}</tr>'
        f'<tr><th scope="col">Stage</th><th></th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _numbers(allocation: dict[str, Any], tower: str) -> str:
    share, difficulty = allocation["ratios"].get(tower), allocation.get("difficulty", {}).get(tower)
    values = (
        NONE if share is None else f"{number_text(100 * share)} %",
        str(allocation.get("budget", {}).get(tower, 0)),
        amount_text(difficulty),
    )
    return '<td class="first">' + "</td><td>".join(values) + "</td>"


def _stacked(shares: dict[str, float], towers: list[str]) -> str:
    parts = "".join(
        f'<i class="{escape(tower)}" style="flex-grow:{share:.4f}"></i>'
        for tower in towers
        if (share := shares.get(tower))
    )
    return f'<span class="stack">{parts}</span>'


def _placement(results: Results, modules: TowerModules) -> str:
    """The map of a tower: which module (column) got an expert in which stage (row), and how often over all."""
    decided, chosen, stages = experts(results, modules), times_chosen(results), len(results.allocation)
    rows: list[tuple[str, list[Cell | None]]] = [
        (stage, [_cell(modules, stage, path, expert) for path, expert in own.items()]) for stage, own in decided.items()
    ]
    bars = [(chosen[path], f"{modules.short(path)}: chosen in {chosen[path]} of {stages}") for path in modules.paths]
    drawn = draw_map(
        [(label, len(own)) for label, own in modules.layers],
        rows,
        title=f"{TOWER_NAMES[modules.tower]}: which module got an expert in which stage",
        bars=bars if stages > 1 else None,
        highest=stages,
        style=modules.tower,
    )
    used = sum(chosen[path] > 0 for path in modules.paths)
    measured = any(expert.score is not None for own in decided.values() for expert in own.values())
    of = f" of {len(modules.paths)}" if measured else ""  # without scores, only those are known that were chosen
    return (
        f'<h3>{TOWER_NAMES[modules.tower]}</h3><p class="soft">{used}{of} modules got an expert in some stage. '
        f"{columns_text(modules)}</p>{drawn.html}"
    )


def _cell(modules: TowerModules, stage: str, path: str, expert: Expert) -> Cell:
    about = "no expert" if expert.rank is None else f"rank {expert.rank}"
    if expert.score is not None:
        about += f", score {amount_text(expert.score)} (place {expert.place} of {len(modules.paths)})"
    style = "" if expert.rank is None else modules.tower
    return Cell(style, f"{modules.short(path)}, {stage}: {about}")
