"""Backward-transfer evaluation: the scores after a stage become the accuracy matrix, files, curves and a page."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from rich.console import Console

from callbacks.base import evaluated_stage
from mcit_lightning.allocation import natural
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.kept import KeptTask, find_row, kept_tasks
from mcit_lightning.evaluation.metrics import task_metric
from mcit_lightning.evaluation.predictions import (
    drop_parts,
    merge_parts,
    prediction_file,
    write_part,
    write_predictions,
)
from mcit_lightning.evaluation.report import write_report
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.routing import routing_summary
from mcit_lightning.evaluation.table import stage_table
from mcit_lightning.loggers import StageTensorBoardLogger
from mcit_lightning.plans import FreezeRecord, StructureLog, TaskPlan
from mcit_lightning.stage_logger import StageLogger
from mcit_lightning.stages import Stage
from mcit_lightning.towers import TOWERS, Towers

logger = logging.getLogger(__name__)


class BackwardTransfer(L.Callback):
    """Collects the predictions of `trainer.test`, fills the accuracy matrix and writes everything that is made from it.

    Writes, below the run directory (the parent of the Trainer's `default_root_dir`):
    `predictions/<stage>/<task>.jsonl`, `results.json`, `accuracy_matrix.csv`, the forgetting curves of TensorBoard
    and `report.html`. Scores are taken from `trainer.callback_metrics["test/<task>/<metric>"]`. Under several
    processes each writes its share of the predictions when it is done with a task; rank zero joins them in the end and checks
    that every row was evaluated exactly once. Tasks that an interrupted evaluation has finished are not evaluated again.

    The module must have `config`, `results`, `structure`, `towers` and `eval_cost`, the data module `stage`, `test_tasks`,
    `evaluate_only` and `split`.

    Raises:
        RuntimeError: predictions are missing or repeated (on every rank, after rank zero has counted).
    """

    fills_matrix = True
    """What the configuration looks for: a run without such a callback would end with nothing to show."""

    def __init__(self) -> None:
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._kept: dict[str, KeptTask] = {}
        self._scores: dict[str, float] = {}
        self._clock: dict[str, float] = {}
        self._spent: dict[str, dict[str, float]] = {}
        self._report: Results | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Before an evaluation: look for finished tasks of an interrupted one. Before a training: what is left is out of date."""
        root, folder = _root(trainer), Path(trainer.default_root_dir).name
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        if stage == "fit" and trainer.is_global_zero:
            drop_parts(root, folder)
        if stage == "test":
            self._report = None
            self._kept = {}
            if trainer.is_global_zero and _whole(trainer):
                self._kept = self._find_kept(pl_module, stream, root, folder, trainer.world_size)
            self._scores = trainer.strategy.broadcast({task: kept.score for task, kept in self._kept.items()})
            if self._scores:
                logger.info("%s: evaluated before the interruption: %s", folder, ", ".join(self._scores))
                stream.evaluate_only([task for task in stream.test_tasks if task not in self._scores])
            self._rows = {task: [] for task in stream.test_tasks}
            self._spent = {}

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock; the module's own start at zero, a moment later."""
        self._clock = dict.fromkeys(_now(pl_module), 0.0) | {"seconds": time.perf_counter()}

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of a batch, and write them when the task is done: an interruption then does not lose them."""
        for row in outputs:
            self._rows[row["task"]].append(row)
        if batch_idx + 1 == trainer.num_test_batches[dataloader_idx]:
            self._write_part(trainer, pl_module, list(self._rows)[dataloader_idx])

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the predictions, enter the scores, and report."""
        results: Results = pl_module.results  # type: ignore[assignment]
        metrics = {**results.metrics, **results.held_out.metrics}
        for task in self._rows:
            self._scores[task] = float(trainer.callback_metrics[f"test/{task}/{metrics[task]}"])
        self._finish(trainer, pl_module)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the table, when the progress bar of the evaluation is closed."""
        if stage != "test":
            return
        if self._scores and not self._rows:  # every task was finished, so there was no loop
            self._finish(trainer, pl_module)
        if self._report is not None:
            Console().print(stage_table(self._report))
            self._report = None

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        root, stage = _root(trainer), evaluated_stage(trainer)
        samples = self._write_predictions(trainer, pl_module, root)
        results: Results = pl_module.results  # type: ignore[assignment]
        tasks = [task for task in results.tasks if task in self._scores]
        for task in tasks:
            if stage is None:
                results.matrix.set_zero_shot(task, self._scores[task])
            else:
                results.matrix.set(stage.row, task, self._scores[task])
        for task in results.held_out.metrics:
            if task in self._scores:
                results.held_out.set(0 if stage is None else stage.row + 1, task, self._scores[task])
        if trainer.is_global_zero:
            if stage is not None:
                self._enter_cost(results, stage, samples)
                routing = routing_summary(root, stage.folder, tasks, results.tasks[: stage.row + 1])
                if routing is not None:
                    before = results.routing or {}
                    results.routing = {
                        **routing,
                        "per_stage": {**before.get("per_stage", {}), stage.name: routing["accuracy"]},
                        "rejected_per_stage": {**before.get("rejected_per_stage", {}), stage.name: routing["rejected"]},
                    }
            _enter_structure(results, pl_module.structure, pl_module.towers)  # type: ignore[arg-type]
            self._publish(trainer, root, results, stage)
            drop_parts(root, Path(trainer.default_root_dir).name)

    def _find_kept(
        self, pl_module: L.LightningModule, stream: Any, root: Path, folder: str, processes: int
    ) -> dict[str, KeptTask]:
        """What need not be evaluated again; rank zero only."""
        splits = {task: stream.split(task, "test") for task in stream.test_tasks}
        config: ExperimentConfig = pl_module.config  # type: ignore[assignment]
        metrics = {task: task_metric(config.tasks[task]) for task in splits}
        kept = kept_tasks(root, folder, splits, metrics, config.data.eval_batch_size)
        left = [len(split) for task, split in splits.items() if task not in kept]
        # a process without any row would not enter the evaluation, and the others would wait for it
        return {} if left and max(left) < processes else kept

    def _write_part(self, trainer: L.Trainer, pl_module: L.LightningModule, task: str) -> None:
        """This process's share of a task, and the seconds since the last one."""
        now = _now(pl_module)
        self._spent[task] = {name: now[name] - self._clock[name] for name in now}
        self._clock = now
        path = prediction_file(_root(trainer), Path(trainer.default_root_dir).name, task)
        write_part(path, trainer.global_rank, self._rows[task], **self._spent[task])

    def _write_predictions(self, trainer: L.Trainer, pl_module: L.LightningModule, root: Path) -> int:
        """Number of rows that all ranks together evaluated."""
        folder = Path(trainer.default_root_dir).name
        for task in self._rows:
            if task not in self._spent:  # this process had no row of it
                self._write_part(trainer, pl_module, task)
        trainer.strategy.barrier()
        count, problem = 0, ""
        if trainer.is_global_zero:
            try:
                for task, expected in zip(self._rows, _expected(trainer), strict=True):
                    count += merge_parts(prediction_file(root, folder, task), trainer.world_size, expected)
                for task, kept in self._kept.items():
                    count += write_predictions(prediction_file(root, folder, task), kept.parts, None)
            except RuntimeError as error:
                problem = str(error)
        count, problem = trainer.strategy.broadcast((count, problem))  # so that no rank waits for one that has given up
        if problem:
            raise RuntimeError(problem)
        return count

    def _enter_cost(self, results: Results, stage: Stage, samples: int) -> None:
        """Seconds of this evaluation and of what was kept of an interrupted one; the shares per sample are rank zero's."""
        first = [kept.parts[0] for kept in self._kept.values()]
        seconds, routing, generation, first_routing, examined = (
            sum(spent[name] for spent in self._spent.values()) + sum(getattr(part, name) for part in first)
            for name in ("seconds", "routing", "generation", "first_routing", "examined")
        )
        own = max(1, sum(map(len, self._rows.values())) + sum(len(part.rows) for part in first))
        cost = results.cost_row(stage.name, stage.folder, stage.row)
        cost.eval_seconds, cost.eval_samples_per_second = seconds, samples / seconds
        cost.routing_seconds_per_sample, cost.generation_seconds_per_sample = routing / own, generation / own
        cost.first_routing_seconds_per_sample = first_routing / examined if examined else None

    def _publish(self, trainer: L.Trainer, root: Path, results: Results, stage: Stage | None) -> None:
        """Everything that people and scripts read; rank zero only."""
        results.save(root)
        config = root / "config.yaml"
        images = _Images(trainer.datamodule)  # type: ignore[attr-defined]
        write_report(root, results, config.read_text(encoding="utf-8") if config.is_file() else "", images)
        # last, because a curve's point cannot be taken back if the run is killed before this stage is marked as done
        for logger in trainer.loggers:
            if isinstance(logger, StageTensorBoardLogger | StageLogger):
                logger.log_forgetting(results, 0 if stage is None else stage.row + 1)
        self._report = results


class _Images:
    """Finds the picture of a test row, for the report."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __call__(self, task: str, index: int) -> Path | Image.Image | None:
        split = self.stream.split(task, "test")
        position = find_row(split, index)
        if position is None or not split[position].images:
            return None
        image = split[position].images[0]
        return Path(image) if isinstance(image, str) else image.open()


def _enter_structure(results: Results, structure: StructureLog, towers: Towers) -> None:
    """Say which modules of the evaluated model have which branches, and what froze after which stage."""
    plans = [entry for entry in structure.entries if isinstance(entry, TaskPlan)]
    paths = {path for plan in plans for path in (*plan.ranks, *plan.extra.get("scores", {}))}
    results.modules = {}
    for tower in TOWERS:
        own = sorted((path for path in paths if towers.tower_of(path) == tower), key=natural)
        if own:
            adapters = (towers.adapters.get(path) for path in own)
            names = ([] if layer is None else list(layer.lora_b) for layer in adapters)
            results.modules[tower] = dict(zip(own, names, strict=True))
    records = [entry for entry in structure.entries if isinstance(entry, FreezeRecord)]
    results.freezing = {record.stage: record.branches for record in records}


def _root(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir).parent


def _now(pl_module: L.LightningModule) -> dict[str, float]:
    """The clock, and what the evaluation spent so far."""
    return {"seconds": time.perf_counter(), **pl_module.eval_cost}  # type: ignore[dict-item]


def _whole(trainer: L.Trainer) -> bool:
    """Whether every row is evaluated: the Trainer was not told to stop early."""
    limit = trainer.limit_test_batches
    return isinstance(limit, float) and limit == 1.0  # the int 1 means one batch


def _expected(trainer: L.Trainer) -> list[int | None]:
    """Rows of each test split; None where the Trainer was told to stop early."""
    loaders: Any = trainer.test_dataloaders or []
    return [len(loader.dataset) if _whole(trainer) else None for loader in loaders]
