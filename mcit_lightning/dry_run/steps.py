"""Optimizer steps of every stage, counted as the data module and the Trainer will count them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.replay import Replay
from mcit_lightning.optimization import epoch_steps
from mcit_lightning.stages import Stage


@dataclass(frozen=True)
class StageSteps:
    """How long a stage trains.

    Args:
        stage: the stage.
        rows: training rows, repetitions of a joint stage and a buffer of earlier tasks included; None where a file is not there.
        epochs: passes over them.
        batch_size: samples per device and micro-batch.
        steps: optimizer steps; None as `rows`.
    """

    stage: Stage
    rows: int | None
    epochs: int
    batch_size: int
    steps: int | None


def count_steps(
    config: ExperimentConfig,
    stages: Sequence[Stage],
    rows: Mapping[str, int],
    devices: int,
    replay: Callable[[Stage, Mapping[str, int]], Replay] | None = None,
) -> list[StageSteps]:
    """Steps of each stage.

    Args:
        config: the experiment.
        stages: its stages.
        rows: task -> training rows in use, of the tasks whose file is there.
        devices: processes that train side by side.
        replay: what the strategy mixes into a stage (`ContinualStrategy.replay`).

    Raises:
        ValueError: the strategy's replay does not fit into a batch.
    """
    counted: list[StageSteps] = []
    for stage in stages:
        tasks = {name: config.tasks[name] for name in stage.train}
        sizes = {task.batch_size or config.data.batch_size for task in tasks.values()}
        batch_size = sizes.pop() if len(sizes) == 1 else config.data.batch_size
        alone = len(tasks) == 1
        epochs = next(iter(tasks.values())).epochs if alone else 1
        total = None
        if all(name in rows for name in tasks):
            total = sum(rows[name] * (1 if alone else task.epochs) for name, task in tasks.items())
        earlier = dict.fromkeys(task for before in stages[: stage.index] for task in before.train if not stage.reset)
        seen = {task: rows.get(task, 0) for task in earlier if task not in tasks}
        mixed = Replay() if replay is None else replay(stage, seen)
        per_batch = mixed.per_batch(batch_size)
        if total is not None and not per_batch:
            total += sum(mixed.rows.values())
        steps = None if total is None else _steps(total, batch_size - per_batch, epochs, devices, config.trainer)
        counted.append(StageSteps(stage, total, epochs, batch_size, steps))
    return counted


def _steps(rows: int, batch_size: int, epochs: int, devices: int, trainer: Mapping[str, Any]) -> int:
    per_device = -(-rows // devices)
    batches = -(-per_device // batch_size)
    accumulate = int(trainer.get("accumulate_grad_batches", 1))
    return max(1, epoch_steps(batches, trainer.get("limit_train_batches"), accumulate) * epochs)
