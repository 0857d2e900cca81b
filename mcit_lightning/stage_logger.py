"""Any Lightning logger (Weights & Biases, CSV, MLflow, ...) beside TensorBoard, over all stages of a run."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from typing_extensions import override

from mcit_lightning.errors import first_line
from mcit_lightning.evaluation.results import Results
from mcit_lightning.instantiate import check_arguments, split_node
from mcit_lightning.loggers import curve_values

FOLDER = "save_dir"
"""Argument of Lightning's loggers that is `loggers/` in the run directory unless the experiment sets it."""


class StageLogger(Logger):
    """A logger that every stage's Trainer shares, with steps that go on from stage to stage.

    Args:
        inner: the logger that writes.
    """

    def __init__(self, inner: Logger) -> None:
        super().__init__()
        self.inner = inner
        self.step_offset = 0
        """Optimizer steps of all finished stages; the runner advances it before each stage."""
        self._last = 0

    @property
    @override
    def name(self) -> str | None:
        return self.inner.name

    @property
    @override
    def version(self) -> int | str | None:
        return self.inner.version

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._last = max(self._last, self.step_offset + (step or 0))
        self.inner.log_metrics(dict(metrics), None if step is None else step + self.step_offset)

    @override
    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.inner.log_hyperparams(params, *args, **kwargs)

    @rank_zero_only
    def log_forgetting(self, results: Results, stage: int) -> None:
        """The scores and summaries after a stage, with `stage` beside them, at the last training step.

        Some services take no step that is smaller than an earlier one, so the number of the stage cannot be the step.

        Args:
            results: the results, the stage's included.
            stage: 1-based row of the matrix that the stage filled; 0 for the zero-shot evaluation.
        """
        self.inner.log_metrics({**curve_values(results, stage), "stage": float(stage)}, self._last)
        self.inner.save()

    @override
    @rank_zero_only
    def save(self) -> None:
        self.inner.save()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.inner.finalize(status)


def check_loggers(nodes: Sequence[Mapping[str, Any]]) -> None:
    """Check the experiment's `loggers` without building them.

    Raises:
        ValueError: a node names no Lightning logger, or an argument that it does not have.
    """
    for index, node in enumerate(nodes):
        where = f"loggers[{index}]"
        target, kwargs = split_node(node, where)
        if not (inspect.isclass(target) and issubclass(target, Logger)):
            raise ValueError(f"{where}._target_: {node['_target_']!r} is not a Lightning logger")
        check_arguments(target, kwargs, where, given=(FOLDER,))


def build_loggers(nodes: Sequence[Mapping[str, Any]], root: Path) -> list[StageLogger]:
    """The experiment's loggers.

    Args:
        nodes: `{_target_: dotted.path, ...}` each.
        root: the run directory.

    Raises:
        ValueError: a logger's package is not installed, or it refuses a value.
    """
    loggers = []
    for index, node in enumerate(nodes):
        target, kwargs = split_node(node, f"loggers[{index}]")
        if FOLDER in inspect.signature(target).parameters:
            kwargs.setdefault(FOLDER, str(root / "loggers"))
        try:
            loggers.append(StageLogger(target(**kwargs)))
        except (ImportError, ModuleNotFoundError, TypeError, ValueError) as error:
            text = first_line(error)
            raise ValueError(f"loggers[{index}]: {node['_target_']} cannot be made: {text}") from error
    return loggers
