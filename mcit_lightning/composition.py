"""Experiments that are put together by name: `llava7b+ucit+dmole` is a backbone, a benchmark and a strategy.

Each part is a file of `experiments/_base/`, a YAML file of the user's own, or the name of a strategy. What a strategy of
`_base/strategy/` sets is its paper's; any other strategy starts from the defaults of its `Config`.
"""

from dataclasses import dataclass
from pathlib import Path

from mcit_lightning.registry import nearest

SEPARATOR = "+"


@dataclass(frozen=True)
class Composition:
    """The parts of an experiment.

    Args:
        name: the experiment's name.
        files: part to its file, in the order in which they are merged: strategies come last.
        strategy: a strategy that has no file.
    """

    name: str
    files: dict[str, Path]
    strategy: str | None


def compose(name: str, folder: Path) -> Composition | None:
    """The composition that `name` means; None if it is no composition.

    Args:
        name: parts joined by `+`, or anything else.
        folder: the experiments' folder.

    Raises:
        ValueError: a part is unknown (names the nearest), or two parts are strategies.
    """
    parts = name.split(SEPARATOR)
    if len(parts) < 2 or Path(name).is_file():
        return None
    from mcit_lightning.strategies import STRATEGIES  # imports torch

    base = folder / "_base"
    names, files, strategies = [], dict[str, Path](), dict[str, Path | None]()
    for part in parts:
        own, preset, method = Path(part), base / f"{part}.yaml", base / "strategy" / f"{part}.yaml"
        names.append(own.stem if own.suffix == ".yaml" else part)
        if method.is_file() or (part in STRATEGIES and not preset.is_file()):
            strategies[part] = method if method.is_file() else None
        elif preset.is_file():
            files[part] = preset
        elif own.suffix == ".yaml" and own.is_file():
            files[part] = own
        else:
            known = {path.stem for path in base.glob("**/*.yaml")} | set(STRATEGIES)
            raise ValueError(f"{name}: no backbone, benchmark or strategy {part!r}. {nearest(part, known - {'run'})}")
    if len(strategies) > 1:
        raise ValueError(f"{name}: names {len(strategies)} strategies, {' and '.join(strategies)}; name one")
    bare = None
    for part, file in strategies.items():
        if file is None:
            bare = part
        else:
            files[part] = file
    return Composition(SEPARATOR.join(names), files, bare)
