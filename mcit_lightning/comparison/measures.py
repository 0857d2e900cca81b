"""The numbers of a run that a comparison shows, with their names, and how each is read."""

from collections.abc import Callable
from dataclasses import dataclass

from mcit_lightning.comparison.find import Run
from mcit_lightning.comparison.methods import Group, Method
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.results import CostRow


@dataclass(frozen=True)
class Measure:
    """A number of a run.

    Args:
        key: its name in tables that programs read.
        heading: its name in tables that people read.
        why: what it is.
        value: takes it from a run; None where the run has none.
        better: 1 if a higher one is better, -1 if a lower one is, 0 if neither.
        signed: it is read with its sign.
    """

    key: str
    heading: str
    why: str
    value: Callable[[Run], float | None]
    better: int = 1
    signed: bool = False

    def of(self, method: Method) -> Estimate | None:
        """Its mean over a method's seeds."""
        return method.estimate(self.value)


def _summary(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.results.summary[key]


def _router(run: Run) -> float | None:
    return None if run.results.routing is None else run.results.routing.get("accuracy")


def last_cost(value: Callable[[CostRow], float | None]) -> Callable[[Run], float | None]:
    """A cost after the last stage."""
    return lambda run: value(run.results.cost[-1]) if run.results.cost else None


def largest_cost(value: Callable[[CostRow], float | None]) -> Callable[[Run], float | None]:
    """The largest cost of all stages."""
    return lambda run: max((known for row in run.results.cost if (known := value(row)) is not None), default=None)


def total_cost(value: Callable[[CostRow], float | None]) -> Callable[[Run], float | None]:
    """A cost over all stages; None if no stage has it."""

    def total(run: Run) -> float | None:
        known = [own for row in run.results.cost if (own := value(row)) is not None]
        return sum(known) if known else None

    return total


SCORES = (
    Measure("MFN", "MFN", "mean score of all tasks after the last stage", _summary("MFN")),
    Measure("MFT", "MFT", "mean score of every task right after it was learnt", _summary("MFT")),
    Measure("MAA", "MAA", "mean over the stages of the mean score of the tasks seen so far", _summary("MAA")),
    Measure("BWT", "BWT", "mean change of earlier tasks since they were learnt", _summary("BWT"), signed=True),
    Measure("forgetting", "Forgetting", "mean loss of earlier tasks from their best score", _summary("forgetting"), -1),
    Measure("AVG", "AVG", "mean over all stages and tasks, unseen ones included", _summary("AVG")),
    Measure("FWT", "FWT", "mean gain over zero-shot just before a task is learnt", _summary("FWT"), signed=True),
    Measure("router", "Router", "samples of learnt tasks that were routed to their own task", _router),
)
"""Percent, from the most looked-at on."""

COSTS = (
    Measure(
        "trainable_params",
        "Trainable",
        "parameters that train, in the largest stage",
        largest_cost(lambda cost: cost.trainable_params),
        0,
    ),
    Measure(
        "stored_params",
        "Stored",
        "parameters to keep after the last stage",
        last_cost(lambda cost: cost.stored_params),
        0,
    ),
    Measure(
        "before_seconds",
        "Probe, router",
        "time before the training, all stages",
        total_cost(lambda cost: _sum(cost.proxy_seconds, cost.router_seconds)),
        0,
    ),
    Measure(
        "train_seconds",
        "Training",
        "time of the training loops, all stages",
        total_cost(lambda cost: cost.train_seconds),
        0,
    ),
    Measure(
        "eval_seconds",
        "Evaluation",
        "time of the evaluations, all stages",
        total_cost(lambda cost: cost.eval_seconds),
        0,
    ),
    Measure(
        "peak_memory_bytes",
        "Peak memory",
        "highest of all stages",
        largest_cost(lambda cost: cost.peak_memory_bytes),
        0,
    ),
)
"""Parameters, seconds and bytes."""


def shown_scores(group: Group) -> list[Measure]:
    """The scores that some method of a group has."""
    return [measure for measure in SCORES if any(measure.of(method) is not None for method in group.methods)]


def best_of(measure: Measure, group: Group) -> set[str]:
    """Names of the methods with the best mean, bounds not counted; none if all are alike or fewer than two."""
    means = {
        method.name: round(found.mean, 6)
        for method in group.methods
        if method.bound is None and (found := measure.of(method)) is not None
    }
    if measure.better == 0 or len(set(means.values())) < 2:
        return set()
    best = max(means.values()) if measure.better > 0 else min(means.values())
    return {name for name, mean in means.items() if mean == best}


def _sum(*values: float | None) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
