"""The report's part on frozen branches: which branch of which module froze when, and who used it again."""

from html import escape

from mcit_lightning.allocation import natural
from mcit_lightning.evaluation.module_map import TOWER_NAMES, Cell, ModuleMap, columns_text, draw_map
from mcit_lightning.evaluation.page import line_table, section
from mcit_lightning.evaluation.placement import Branch, TowerModules, branches, tower_modules
from mcit_lightning.evaluation.results import Results

COLOURS = 8
"""Colours of stages in the page's CSS; later stages have them again, paler."""


def freezing_section(results: Results) -> str:
    """Counts per stage and a map per tower; empty if nothing froze."""
    if not results.freezing:
        return ""
    fates = branches(results)
    again = any(branch.again for own in fates.values() for branch in own.values())
    dots = " A dot: a later stage used the branch most again; it has the colour of the last one." if again else ""
    total = sum(map(len, fates.values()))
    maps = [_map(results, modules) for modules in tower_modules(results)]
    return section(
        "Frozen branches",
        f"The {total} branches of {len(fates)} modules, coloured by the stage after which they froze.{dots}",
        _counts(results, fates, again=again),
        stage_legend(list(results.freezing)),
        *maps,
    )


def stage_style(number: int) -> str:
    """CSS classes of a stage, counted from 0."""
    return f"t{number % COLOURS}" + (" pale" if number >= COLOURS else "")


def _counts(results: Results, fates: dict[str, dict[str, Branch]], *, again: bool) -> str:
    every = [branch for own in fates.values() for branch in own.values()]
    left = len(every)
    rows = []
    for stage in results.freezing:
        frozen = sum(branch.frozen == stage for branch in every)
        left -= frozen
        cells = [str(frozen), f"{left} ({100 * left / max(1, len(every)):.0f} %)"]
        if again:
            cells.insert(1, str(sum(stage in branch.again for branch in every)))
        rows.append((stage, cells))
    return line_table(["After", "Frozen", *(["Used again"] if again else []), "Still tunable"], rows)


def stage_legend(stages: list[str]) -> str:
    """The colours of the stages and of branches that can still be tuned."""
    items = "".join(
        f'<li class="{stage_style(number)}"><i></i><span>{escape(stage)}</span></li>'
        for number, stage in enumerate(stages)
    )
    return f'<ul class="legend boxes">{items}<li class="tunable"><i></i><span>tunable</span></li></ul>'


def freezing_map(results: Results, modules: TowerModules, *, about: str = "") -> ModuleMap | None:
    """A column per module, a row per branch, coloured by the stage after which it froze; None if the tower has no branches.

    A dot has the colour of the last stage that used the branch most again.

    Args:
        results: of a strategy that freezes branches.
        modules: a tower of theirs.
        about: what stands before the tower's name in the drawing's description.
    """
    fates = branches(results)
    layers = [(label, [path for path in own if fates.get(path)]) for label, own in modules.layers]
    paths = [path for _, own in layers for path in own]
    if not paths:
        return None
    names = sorted({name for path in paths for name in fates[path]}, key=natural)
    styles = {stage: stage_style(number) for number, stage in enumerate(results.freezing)}
    rows = [
        (name, [_cell(modules.short(path), name, fates[path].get(name), styles) for path in paths]) for name in names
    ]
    title = f"{about}{TOWER_NAMES[modules.tower]}: stage after which each branch of each module froze"
    return draw_map([(label, len(own)) for label, own in layers if own], rows, title=title)


def _map(results: Results, modules: TowerModules) -> str:
    drawn = freezing_map(results, modules)
    if drawn is None:
        return ""
    return f'<h3>{TOWER_NAMES[modules.tower]}</h3><p class="soft">{columns_text(modules)}</p>{drawn.html}'


def _cell(path: str, name: str, branch: Branch | None, styles: dict[str, str]) -> Cell | None:
    if branch is None:
        return None
    if branch.frozen is None:
        return Cell("", f"{path}, {name}: tunable")
    again = f", used most again in {', '.join(branch.again)}" if branch.again else ""
    dot = styles[branch.again[-1]] if branch.again else ""
    return Cell(styles[branch.frozen], f"{path}, {name}: frozen after {branch.frozen}{again}", dot=dot)
