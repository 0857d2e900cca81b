"""What every metric has in common, and the table of their names."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from mcit_lightning.config import TaskConfig
from mcit_lightning.registry import Registry

Mode = Literal["fixed", "published"]


class AnswerMetric(Metric):
    """Mean score of the answers of one task, in percent.

    The states are a sum and a count, so the value over several ranks is the exact mean over all rows, however they
    are split. Float64 keeps the sum exact enough that it does not depend on the order of the rows.

    Args:
        mode: `fixed` scores as the metric says; `published` scores as the script of the benchmark does that the class
            names in `published`, defects included.

    Raises:
        ValueError: there is no such mode.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    published: ClassVar[str] = ""
    """The published script and the tasks that are scored with it; empty where there is none."""
    needs_reference: ClassVar[bool] = True
    """There is a right answer to compare with."""
    published_by_line: ClassVar[bool] = False
    """The published script takes the n-th prediction for the n-th question, whatever their ids."""
    published_counts_missing: ClassVar[bool] = False
    """The published script counts a question without a prediction as wrong; the others leave it out."""
    total: Tensor
    count: Tensor

    def __init__(self, *, mode: Mode = "fixed") -> None:
        super().__init__()
        if mode not in ("fixed", "published"):
            raise ValueError(f"the mode of a metric is 'fixed' or 'published', got {mode!r}")
        if mode == "published" and not self.published:
            raise ValueError(
                f"{type(self).__name__} has no mode 'published': no benchmark scores with it. Use 'fixed'."
            )
        self.mode: Mode = mode
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        """Score of one row, between 0 and 1 (CIDEr: 0 and 10).

        Args:
            prediction: the generated text.
            reference: the answer as the test file holds it; a list means that any of its members is right.
            extra: the other keys of the row.

        Raises:
            ValueError: the reference or a key of the row is of a kind that this metric cannot use.
        """
        raise NotImplementedError

    def scores(
        self, predictions: Sequence[str], references: Sequence[Any], extras: Sequence[dict[str, Any]]
    ) -> list[float]:
        """Scores of the rows of a batch: each by itself, except where a published script lets a batch's rows interact."""
        return [self.score(*row) for row in zip(predictions, references, extras, strict=True)]

    def check(self, reference: Any, extra: dict[str, Any]) -> None:
        """Refuse a row that `score` could not use, so that bad data is found before any training.

        Raises:
            ValueError: as `score`.
        """
        self.score("", reference, extra)

    def group(self, extra: dict[str, Any]) -> str | None:
        """The category of a row, for benchmarks that report scores by category; None where there is none."""
        return None

    def update(self, predictions: Sequence[str], references: Sequence[Any], extras: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a batch."""
        for value in self.scores(predictions, references, extras):
            self.total += value
            self.count += 1

    def compute(self) -> Tensor:
        """Mean score in percent; NaN if no row was added."""
        return 100.0 * self.total / self.count

    def details(self) -> dict[str, float]:
        """Further numbers about the rows added so far, in percent, by name; empty where there are none."""
        return {}

    def row_scores(self) -> list[float] | None:
        """Scores of the rows added here, in their order, where they depend on all rows (CIDEr); None where `score` has them."""
        return None


METRICS: Registry[AnswerMetric] = Registry("metric")


def get_metric(name: str) -> type[AnswerMetric]:
    """The class of the metric called `name`.

    Raises:
        ValueError: there is none; the message names the nearest known one.
    """
    return METRICS.get(name)


def build_metric(name: str, mode: Mode = "fixed", arguments: Mapping[str, Any] | None = None) -> AnswerMetric:
    """The metric called `name`.

    Args:
        name: as registered.
        mode: see `AnswerMetric`.
        arguments: further arguments of its class.

    Raises:
        ValueError: there is no such metric, it has no such mode or argument, or it needs something that is not installed.
    """
    return get_metric(name)(**_arguments(name, mode, arguments))


def task_metric(task: TaskConfig) -> AnswerMetric:
    """The metric of a task, as its `metric`, `metric_mode` and `metric_args` say. Raises as `build_metric`."""
    return build_metric(task.metric, task.metric_mode, task.metric_args)


def check_metric(task: TaskConfig) -> None:
    """Check a task's metric by name, mode and names of arguments, whether or not what it needs is installed.

    Raises:
        ValueError: there is no such metric, or it has no such mode or argument.
    """
    _arguments(task.metric, task.metric_mode, task.metric_args)


def _arguments(name: str, mode: Mode, arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    chosen = get_metric(name)
    if mode == "published" and not chosen.published:
        raise ValueError(f"the metric {name!r} has no mode 'published': no benchmark scores with it. Use 'fixed'.")
    # Metrics of an experiment's own may take no arguments at all.
    given = {**({} if mode == "fixed" else {"mode": mode}), **(arguments or {})}
    try:
        inspect.signature(chosen).bind(**given)
    except TypeError as error:
        raise ValueError(f"the metric {name!r} does not take {given}: {error}") from error
    return given


def references_of(reference: Any) -> list[str]:
    """The right answers as texts, whether the file holds one or a list of them.

    Raises:
        ValueError: there is none, or one is no text or number.
    """
    answers = reference if isinstance(reference, list | tuple) else [reference]
    if not answers or any(answer is None or isinstance(answer, dict | list) for answer in answers):
        raise ValueError(f"the answer must be a text, a number or a non-empty list of them, got {reference!r}")
    return [str(answer) for answer in answers]


def single_text(reference: Any, script: str) -> str:
    """The right answer where a published script can only take one text.

    Raises:
        ValueError: it is a list, an object or missing.
    """
    if isinstance(reference, str):
        return reference
    raise ValueError(f"{script} takes one text as the answer, got {reference!r}; use metric_mode fixed")
