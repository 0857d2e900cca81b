"""The report's part on frozen branches: which branch of which module froze when, and who used it again."""

from html import escape

from mcit_lightning.allocation import natural
from mcit_lightning.evaluation.module_map import TOWER_NAMES, Cell, columns_text, module_map
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
    dots = " A dot: a later stage used the branch most again." if again else ""
    total = sum(map(len, fates.values()))
    maps = [_map(results, modules, fates) for modules in tower_modules(results)]
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


def _map(results: Results, modules: TowerModules, fates: dict[str, dict[str, Branch]]) -> str:
    """A column per module, a row per branch."""
    paths = [path for path in modules.paths if fates[path]]
    if not paths:
        return ""
    names = sorted({name for path in paths for name in fates[path]}, key=natural)
    styles = {stage: stage_style(number) for number, stage in enumerate(results.freezing)}
    rows = [
        (name, [_cell(modules.short(path), name, fates[path].get(name), styles) for path in paths]) for name in names
    ]
    layers = [(label, sum(path in fates and bool(fates[path]) for path in own)) for label, own in modules.layers]
    title = f"{TOWER_NAMES[modules.tower]}: stage after which each branch of each module froze"
    drawn = module_map([(label, size) for label, size in layers if size], rows, title=title)
    return f'<h3>{TOWER_NAMES[modules.tower]}</h3><p class="soft">{columns_text(modules)}</p>{drawn}'


def _cell(path: str, name: str, branch: Branch | None, styles: dict[str, str]) -> Cell | None:
    if branch is None:
        return None
    if branch.frozen is None:
        return Cell("", f"{path}, {name}: tunable")
    again = f", used most again in {', '.join(branch.again)}" if branch.again else ""
    return Cell(styles[branch.frozen], f"{path}, {name}: frozen after {branch.frozen}{again}", dot=bool(branch.again))
