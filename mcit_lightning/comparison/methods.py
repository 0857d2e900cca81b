"""What is compared: methods, their runs over seeds, and the groups of methods that learnt the same tasks in the same order."""

from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape
from typing import Any

from mcit_lightning.comparison.find import Run
from mcit_lightning.comparison.statistics import Estimate, estimate

BOUNDS = {"joint": "upper bound", "individual": "upper bound", "zero_shot": "no training"}
"""Strategies that do not learn a sequence; they are shown, but are not ranked."""


@dataclass(frozen=True)
class Method:
    """The runs of a method on one task order.

    Args:
        name: heading.
        style: number of its colour; the same wherever the method is shown.
        runs: one per seed, in the order of the seeds.
    """

    name: str
    style: int
    runs: list[Run]

    @property
    def strategy(self) -> str:
        """Name of the strategy."""
        return self.runs[0].results.strategy

    @property
    def bound(self) -> str | None:
        """What bound the method is; None for one that learns the sequence."""
        return BOUNDS.get(self.strategy)

    @property
    def seeds(self) -> list[int]:
        """The seeds of the runs."""
        return [run.results.seed for run in self.runs]

    def by_seed(self, value: Callable[[Run], float | None]) -> dict[int, float | None]:
        """Seed -> a number of its run."""
        return {run.results.seed: value(run) for run in self.runs}

    def estimate(self, value: Callable[[Run], float | None]) -> Estimate | None:
        """Mean over the seeds of a number of a run."""
        return estimate([value(run) for run in self.runs])

    def summary(self, key: str) -> Estimate | None:
        """Mean over the seeds of a summary such as `MFN`."""
        return self.estimate(lambda run: run.results.summary[key])


@dataclass(frozen=True)
class Group:
    """The methods that learnt the same tasks in the same order.

    Args:
        tasks: in the order in which they were learnt.
        methods: in the order of the page.
        number: from 1.
    """

    tasks: list[str]
    methods: list[Method]
    number: int

    @property
    def order(self) -> str:
        """The order for reading."""
        return " \N{RIGHTWARDS ARROW} ".join(self.tasks)

    def ranked(self) -> list[Method]:
        """The methods by their mean score at the end, the best first; those without one last."""

        def key(method: Method) -> float:
            last = method.summary("MFN")
            return float("inf") if last is None else -last.mean

        return sorted(self.methods, key=key)


@dataclass
class Comparison:
    """Everything that is compared.

    Args:
        groups: one per task order, in the order in which they were found.
        reference: name of the method that the others are compared with.
        notices: what a reader must know before comparing.
        settings: key -> method -> value, for keys outside the strategies in which the methods differ.
    """

    groups: list[Group]
    reference: str
    notices: list[str] = field(default_factory=list)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of all methods."""
        return list(dict.fromkeys(method.name for group in self.groups for method in group.methods))

    @property
    def runs(self) -> list[Run]:
        """All runs."""
        return [run for group in self.groups for method in group.methods for run in method.runs]


def method_html(method: Method, note: str = "") -> str:
    """A method's name behind its colour; a long name may break after its underscores.

    Args:
        method: which one.
        note: HTML behind the name.
    """
    kind = f"t{method.style % 8}" + (" alt" if method.style >= 8 else "")
    return f'<span class="who"><i class="chip {kind}"></i><span>{escape(method.name).replace("_", "_<wbr>")}{note}</span></span>'
