"""What a strategy will add and train in each stage, as far as it can say before anything is measured."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.allocation import by_layer
from mcit_lightning.plans import TaskPlan
from mcit_lightning.stages import Stage
from mcit_lightning.strategies import ContinualStrategy
from mcit_lightning.strategies.dmole import DMoLE
from mcit_lightning.towers import Towers


@dataclass(frozen=True)
class Range:
    """A number of parameters that is only known within bounds.

    Args:
        low: at least; None where nothing is known but the upper bound.
        high: at most.
    """

    low: int | None
    high: int

    def plus(self, number: int, times: int = 1) -> "Range":
        """`times` this and a known number."""
        return Range(None if self.low is None else times * self.low + number, times * self.high + number)


@dataclass(frozen=True)
class StageForecast:
    """What a stage trains, the projector aside.

    Args:
        stage: the stage.
        trainable: parameters that get gradients.
        stored: adapters and the strategy's own parameters that the model holds by then.
    """

    stage: Stage
    trainable: Range
    stored: Range


@dataclass
class Forecast:
    """What the strategy will do to the model.

    Args:
        stages: stage by stage.
        modules: rows of (tower, ends of the linears' paths, modules, parameters) that carry adapters, or that may.
        choice: in words, how many of the modules get one, where the strategy chooses among them; else empty.
    """

    stages: list[StageForecast]
    modules: list[tuple[str, str, int, int]]
    choice: str = ""


def forecast(strategy: ContinualStrategy, towers: Towers, stages: Sequence[Stage]) -> Forecast:
    """Carry the strategy's plans out on a model without weights.

    Args:
        strategy: the method.
        towers: of a model on the meta device; it grows.
        stages: the run's stages.

    Raises:
        ValueError: a configured target matches nothing in the model.
    """
    if isinstance(strategy, DMoLE) and strategy.config.allocation != "uniform":
        return _allocated(strategy, towers, stages)
    found: list[StageForecast] = []
    freezes = "BranchFreeze" in strategy.required_callbacks()
    for stage in stages:
        if stage.reset:
            towers.detach_all()
        strategy.grow(towers, strategy.plan(stage, towers))
        trained = _size(strategy.trainable(towers, stage))
        stored = _stored(strategy, towers)
        least = None if freezes and found else trained  # what froze after the first task depends on what was used
        found.append(StageForecast(stage, Range(least, trained), Range(stored, stored)))
    rows = [(tower, end, modules, size) for tower, end, modules, _, size in towers.injection_plan()]
    return Forecast(found, rows)


def _allocated(strategy: DMoLE, towers: Towers, stages: Sequence[Stage]) -> Forecast:
    """D-MoLE chooses modules by gradients: their number is known, which ones is not, and modules differ in size."""
    experts, choice = expert_bounds(strategy, towers)
    found: list[StageForecast] = []
    for stage in stages:
        strategy.grow(towers, TaskPlan(stage.name))  # the router alone
        found.append(StageForecast(stage, experts, experts.plus(_stored(strategy, towers), times=len(found) + 1)))
    candidates = [(tower, path) for tower, paths in strategy.candidates(towers).items() for path in paths]
    modules = Counter((tower, path.rpartition(".")[2]) for tower, path in candidates)
    sizes: Counter[tuple[str, str]] = Counter()
    for tower, path in candidates:
        sizes[tower, path.rpartition(".")[2]] += _expert(strategy, towers, path)
    return Forecast(found, [(*key, modules[key], sizes[key]) for key in modules], choice)


def expert_bounds(strategy: DMoLE, towers: Towers) -> tuple[Range, str]:
    """Parameters of a task's experts under the budget, and in words how many modules they are.

    They are fewer if gradients reach fewer linears than the budget allows.
    """
    config = strategy.config
    candidates = strategy.candidates(towers)
    total = sum(len(paths) for paths in candidates.values())
    if config.budget_parameters is not None:
        most = min(
            config.budget_parameters, sum(_expert(strategy, towers, p) for own in candidates.values() for p in own)
        )
        return Range(None, most), f"of these {total} linears, each task adapts as many as fit into its budget"
    units = [[path] for paths in candidates.values() for path in paths]
    if config.unit == "layer":
        units = [list(own) for paths in candidates.values() for own in by_layer(dict.fromkeys(paths, 0.0)).values()]
    sizes = sorted(sum(_expert(strategy, towers, path) for path in unit) for unit in units)
    budget = max(1, int(config.budget * len(units) + 0.5))
    what = "linears" if config.unit == "module" else "layers"
    text = f"of these {total} linears, each task adapts {budget}" + (f" {what}" if config.unit == "layer" else "")
    how = "by their gradients" if config.allocation == "proxy" else "at random"
    return Range(sum(sizes[:budget]), sum(sizes[-budget:])), f"{text}, chosen {how}, with rank {config.rank}"


def _expert(strategy: DMoLE, towers: Towers, path: str) -> int:
    layer = towers.model.get_submodule(path)
    assert isinstance(layer, nn.Linear | AdapterLinear)
    return strategy.config.rank * (layer.in_features + layer.out_features)


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)


def _stored(strategy: ContinualStrategy, towers: Towers) -> int:
    adapters = (parameter for layer in towers.adapters.values() for _, parameter in layer.adapter_parameters())
    return _size(adapters) + _size(strategy.parameters()) + _size(strategy.buffers())
