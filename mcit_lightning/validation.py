"""Checks across the configuration, made before model or data are touched."""

import inspect
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mcit_lightning.aliases import check_aliases
from mcit_lightning.compilation import check_compile
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.engine import FSDP2, check_engine
from mcit_lightning.evaluation.metrics import check_metric
from mcit_lightning.instantiate import check_arguments, split_node
from mcit_lightning.quantization import check_quantization
from mcit_lightning.registry import nearest
from mcit_lightning.stage_logger import check_loggers
from mcit_lightning.strategies import STRATEGIES, ContinualStrategy
from mcit_lightning.zero import ZERO2, check_zero2

RUNNER_SETS = {
    "callbacks": "use the experiment's callbacks list",
    "default_root_dir": "use out",
    "enable_checkpointing": "callbacks.StageCheckpoint writes the checkpoints",
    "logger": "the runner adds the TensorBoard logger; others go into loggers",
    "max_epochs": "use tasks.<name>.epochs",
    "max_steps": "use tasks.<name>.epochs or data.limit_train",
    "max_time": "stop the run and start the same command again instead",
    "plugins": "the runner sets those for checkpoints and clusters",
    "use_distributed_sampler": "the data module shards by itself",
    "fast_dev_run": "use data.limit_train and data.limit_test; the run would count as finished",
    "overfit_batches": "use data.limit_train",
    "barebones": "the run needs its logger and checkpoints",
}
"""Trainer arguments that the runner sets per stage, and what to use instead."""


def validate(config: ExperimentConfig, source: str) -> None:
    """Check everything that can be checked without model and data.

    Raises:
        ValueError: with `source`, the key, the value and what is valid.
    """
    try:
        _tasks(config)
        _ranges(config)
        strategy = build_strategy(config.strategy)
        _callbacks(config, strategy)
        if config.backbone.compile is not None:
            on_cpu = config.trainer.get("accelerator") == "cpu" or not torch.cuda.is_available()
            check_compile(config.backbone.compile, strategy, config.strategy["name"], on_cpu=on_cpu)
        if config.prepare is not None:
            target, kwargs = split_node(config.prepare, "prepare")
            check_arguments(target, kwargs, "prepare", given=("root",))
        check_loggers(config.loggers)
        _trainer(config.trainer)
        if config.trainer.get("strategy") == FSDP2:
            _sharded(config, strategy)
        if config.trainer.get("strategy") == ZERO2:
            check_zero2(config)
        check_quantization(config, strategy)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _sharded(config: ExperimentConfig, strategy: ContinualStrategy) -> None:
    if not strategy.shards:
        raise ValueError(
            f"trainer.strategy: 'fsdp2' is refused: strategy {config.strategy['name']!r} reads base weights, or looks at samples "
            "outside of its training unequally often on the processes, which a sharded decoder does not allow; use ddp"
        )
    if config.backbone.compile is not None:
        raise ValueError("backbone.compile: was never tried with trainer.strategy fsdp2 and is refused; leave one out")


def build_strategy(node: Mapping[str, Any]) -> ContinualStrategy:
    """The strategy that a configuration node describes.

    Raises:
        ValueError: no name, an unknown strategy or hyper-parameter, or a value of the wrong type or range.
    """
    values = dict(node)
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"strategy.name: is {name!r}, must name a strategy. Known: {', '.join(sorted(STRATEGIES))}.")
    try:
        cls = STRATEGIES.get(name)
    except ValueError as error:
        raise ValueError(f"strategy.name: {error}") from error
    known = [f.name for f in fields(cls.Config)]
    for key, value in values.items():
        if key not in known:
            raise ValueError(
                f"strategy.{key} (value {value!r}): unknown hyper-parameter of {name!r}. {nearest(key, known)}"
            )
    try:
        hyper = OmegaConf.structured(cls.Config)
        for key, value in values.items():  # a mapping replaces the default one: targets are not added to it
            OmegaConf.update(hyper, key, value, merge=False)
        hyper = OmegaConf.to_object(hyper)
    except OmegaConfBaseException as error:
        raise ValueError(f"strategy.{error.full_key or ''}: {str(error).splitlines()[0]}") from error
    except ValueError as error:
        raise ValueError(f"strategy: {error}") from error
    return cls(hyper)


def _callbacks(config: ExperimentConfig, strategy: ContinualStrategy) -> None:
    classes: list[type] = []
    for index, node in enumerate(config.callbacks):
        target, kwargs = split_node(node, f"callbacks[{index}]")
        if not (inspect.isclass(target) and issubclass(target, L.Callback)):
            raise ValueError(
                f"callbacks[{index}]._target_: {node['_target_']!r} is not a lightning Callback; name one, such as "
                "callbacks.StageCheckpoint"
            )
        check_arguments(target, kwargs, f"callbacks[{index}]")
        classes.append(target)
    if not any(issubclass(cls, Checkpoint) for cls in classes):
        raise ValueError("callbacks: none writes checkpoints; add {_target_: callbacks.StageCheckpoint}")
    if not any(getattr(cls, "fills_matrix", False) for cls in classes):
        raise ValueError("callbacks: none fills the accuracy matrix; add {_target_: callbacks.BackwardTransfer}")
    names = {base.__name__ for cls in classes for base in cls.__mro__}
    for needed in strategy.required_callbacks():
        if needed not in names:
            name = config.strategy["name"]
            raise ValueError(
                f"callbacks: strategy {name!r} needs {{_target_: callbacks.{needed}}}; add it to the list. A composition, "
                "such as EXP=quickstart+branchlora, brings a strategy of this package with its callbacks"
            )


def _tasks(config: ExperimentConfig) -> None:
    if not config.tasks:
        raise ValueError("tasks: is empty; name at least one task with its train and test files")
    if len(set(config.order)) != len(config.order):
        raise ValueError(f"order: names a task twice: {config.order}")
    for name in config.tasks:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise ValueError(
                f"tasks.{name}: a task's name becomes file names and parameter names; use letters, digits, - and _"
            )
    check_aliases(config.tasks)
    if both := set(config.order) & set(config.held_out):
        raise ValueError(f"held_out: {', '.join(sorted(both))} is in order too; a held-out task is never trained")
    if len(set(config.held_out)) != len(config.held_out):
        raise ValueError(f"held_out: names a task twice: {config.held_out}")
    for key, name in [("order", name) for name in config.order] + [("held_out", name) for name in config.held_out]:
        if name not in config.tasks:
            raise ValueError(f"{key}: no task {name!r}. {nearest(name, config.tasks)}")
        task = config.tasks[name]
        for split in ("train", "test") if key == "order" else ("test",):
            if getattr(task, split) is None:
                raise ValueError(
                    f"tasks.{name}.{split}: is not set; give the file of that split, relative to data.root"
                )
        try:
            check_metric(task)
        except ValueError as error:
            raise ValueError(f"tasks.{name}.metric: {error}") from error


def _ranges(config: ExperimentConfig) -> None:
    positive: dict[str, float | None] = {
        "data.batch_size": config.data.batch_size,
        "data.eval_batch_size": config.data.eval_batch_size,
        "data.max_length": config.data.max_length,
        "data.max_new_tokens": config.data.max_new_tokens,
        "data.feature_cache_gb": config.data.feature_cache_gb,
        "data.limit_train": config.data.limit_train,
        "data.limit_val": config.data.limit_val,
        "data.limit_test": config.data.limit_test,
        "optim.lr": config.optim.lr,
        "optim.vision_lr": config.optim.vision_lr,
        "optim.projector_lr": config.optim.projector_lr,
        "optim.strategy_lr": config.optim.strategy_lr,
    }
    for name in (*config.order, *config.held_out):
        task = config.tasks[name]
        for key in ("epochs", "batch_size", "lr", "max_new_tokens"):
            positive[f"tasks.{name}.{key}"] = getattr(task, key)
        least, most = task.min_new_tokens, task.max_new_tokens or config.data.max_new_tokens
        if not 0 <= least <= most:
            raise ValueError(
                f"tasks.{name}.min_new_tokens: is {least}, must be in [0, {most}], the task's max_new_tokens"
            )
        for split, rows in task.published_rows.items():
            if split not in ("train", "val", "test"):
                raise ValueError(
                    f"tasks.{name}.published_rows: no split {split!r}. {nearest(split, ('train', 'val', 'test'))}"
                )
            positive[f"tasks.{name}.published_rows.{split}"] = rows
    for key, value in positive.items():
        if value is not None and not 0 < value < float("inf"):  # nan is neither
            raise ValueError(f"{key}: is {value}, must be a finite number greater than 0")
    if not 0 < config.data.fraction <= 1:
        raise ValueError(f"data.fraction: is {config.data.fraction}, must be in (0, 1]")
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed: is {config.seed}, must be in [0, 2^32)")
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ValueError(f"optim.betas: is {list(config.optim.betas)}, must be two numbers in [0, 1)")
    if not 0 <= config.optim.warmup_ratio <= 1:
        raise ValueError(f"optim.warmup_ratio: is {config.optim.warmup_ratio}, must be in [0, 1]")
    if config.data.num_workers < 0 or config.optim.weight_decay < 0:
        raise ValueError("data.num_workers and optim.weight_decay must not be negative")


def _trainer(node: Mapping[str, Any]) -> None:
    known = [name for name in inspect.signature(L.Trainer).parameters if name not in RUNNER_SETS]
    for key, value in node.items():
        if key in RUNNER_SETS:
            raise ValueError(f"trainer.{key} (value {value!r}): is set by the runner; {RUNNER_SETS[key]}")
        if key not in known:
            raise ValueError(
                f"trainer.{key} (value {value!r}): unknown argument of lightning.Trainer. {nearest(key, known)}"
            )
    accumulate = node.get("accumulate_grad_batches", 1)
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ValueError(f"trainer.accumulate_grad_batches: is {accumulate!r}, must be a whole number of at least 1")
    check_engine(node)
