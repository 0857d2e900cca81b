"""Where a run put its adapters: the modules of each tower in the model's order, and what every stage did to them.

What is found here is drawn by the report and by the picture for TensorBoard.
"""

from collections import Counter
from dataclasses import dataclass

from mcit_lightning.allocation import by_layer, natural, ranked
from mcit_lightning.evaluation.results import Results


@dataclass(frozen=True)
class TowerModules:
    """The modules of a tower that a strategy may use.

    Args:
        tower: `vision` or `language`.
        prefix: start of all paths, up to a dot.
        layers: label of a layer (its number) and the paths of its modules, in the model's order.
    """

    tower: str
    prefix: str
    layers: list[tuple[str, list[str]]]

    @property
    def paths(self) -> list[str]:
        """All modules, in the model's order."""
        return [path for _, own in self.layers for path in own]

    def short(self, path: str) -> str:
        """A path without the tower's prefix."""
        return path.removeprefix(self.prefix)

    def kinds(self) -> list[str] | None:
        """What the modules of a layer are called, in order, if that is the same in all layers."""
        names = [[path.rpartition(".")[2] for path in own] for _, own in self.layers]
        return names[0] if all(own == names[0] for own in names) else None


def tower_modules(results: Results) -> list[TowerModules]:
    """The towers that have modules, in the order of the results, each with its own in natural order: layer 10 after layer 9."""
    towers = []
    for tower, modules in results.modules.items():
        if not modules:
            continue
        layers = by_layer(dict.fromkeys(sorted(modules, key=natural), 0.0))
        labels = [path.rpartition(".")[2] for path in layers]
        groups = [(label, list(own)) for label, own in zip(labels, layers.values(), strict=True)]
        towers.append(TowerModules(tower, _common_start(list(modules)), groups))
    return towers


@dataclass(frozen=True)
class Expert:
    """What a stage decided about a module.

    Args:
        rank: rank of the expert that it got; None if it got none.
        score: gradient norm; None if nothing was measured.
        place: 1 for the highest score of the tower in the stage, and so on; None without a score.
    """

    rank: int | None
    score: float | None
    place: int | None


def experts(results: Results, modules: TowerModules) -> dict[str, dict[str, Expert]]:
    """Stage -> module path -> decision, for the stages that had a budget, in order."""
    decided = {}
    for stage, allocation in results.allocation.items():
        measured = allocation.get("scores", {})
        scores = {path: measured[path] for path in modules.paths if path in measured}
        places = {path: place for place, path in enumerate(ranked(scores), start=1)}
        decided[stage] = {
            path: Expert(allocation["ranks"].get(path), scores.get(path), places.get(path)) for path in modules.paths
        }
    return decided


def times_chosen(results: Results) -> Counter[str]:
    """Module path -> number of stages in which it got an expert."""
    return Counter(path for allocation in results.allocation.values() for path in allocation["ranks"])


@dataclass(frozen=True)
class Branch:
    """A branch's fate.

    Args:
        frozen: stage after which it froze; None if it can still be tuned.
        again: later stages that used it most once more.
    """

    frozen: str | None
    again: tuple[str, ...]


def branches(results: Results) -> dict[str, dict[str, Branch]]:
    """Module path -> branch name -> fate, over all modules that have branches."""
    fates = {}
    for modules in results.modules.values():
        for path, names in modules.items():
            chosen = {name: [s for s, own in results.freezing.items() if name in own.get(path, ())] for name in names}
            fates[path] = {
                name: Branch(stages[0] if stages else None, tuple(stages[1:])) for name, stages in chosen.items()
            }
    return fates


def _common_start(paths: list[str]) -> str:
    """What all paths begin with, up to and with a dot; never a whole path, and nothing from the first layer number on."""
    parts = [path.split(".")[:-1] for path in paths]
    shared: list[str] = []
    for column in zip(*parts, strict=False):
        if len(set(column)) > 1 or column[0].isdigit():
            break
        shared.append(column[0])
    return "".join(f"{part}." for part in shared)
