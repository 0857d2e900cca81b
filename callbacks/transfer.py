"""Backward-transfer evaluation: the scores after a stage become the accuracy matrix, files, curves and a page."""

import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import lightning as L
from PIL import Image
from rich.console import Console

from callbacks.base import evaluated_stage
from mcit_lightning.allocation import natural
from mcit_lightning.evaluation.predictions import merge_parts, prediction_file, write_part
from mcit_lightning.evaluation.report import write_report
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.routing import routing_summary
from mcit_lightning.evaluation.table import stage_table
from mcit_lightning.loggers import StageTensorBoardLogger
from mcit_lightning.plans import FreezeRecord, StructureLog, TaskPlan
from mcit_lightning.stages import Stage
from mcit_lightning.towers import TOWERS, Towers


class BackwardTransfer(L.Callback):
    """Collects the predictions of `trainer.test`, fills the accuracy matrix and writes everything that is made from it.

    Writes, below the run directory (the parent of the Trainer's `default_root_dir`):
    `predictions/<stage>/<task>.jsonl`, `results.json`, `accuracy_matrix.csv`, the forgetting curves of TensorBoard
    and `report.html`. Scores are taken from `trainer.callback_metrics["test/<task>/<metric>"]`. Under several
    processes each writes its share of the predictions; rank zero joins them and checks that every row was evaluated
    exactly once.

    The module must have `results`, `structure`, `towers`, `eval_seconds` and `eval_examined`, the data module `stage`,
    `test_tasks` and `split`.

    Raises:
        RuntimeError: predictions are missing or repeated (on every rank, after rank zero has counted).
    """

    fills_matrix = True
    """What the configuration looks for: a run without such a callback would end with nothing to show."""

    def __init__(self) -> None:
        self._rows: dict[str, list[dict[str, Any]]] = {}
        self._started = 0.0
        self._report: Results | None = None

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget an earlier evaluation and start the clock."""
        self._rows = {task: [] for task in trainer.datamodule.test_tasks}  # type: ignore[attr-defined]
        self._report = None
        self._started = time.perf_counter()

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the predictions of a batch."""
        for row in outputs:
            self._rows[row["task"]].append(row)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the predictions, enter the scores, and report."""
        seconds = time.perf_counter() - self._started
        root, stage = _root(trainer), evaluated_stage(trainer)
        samples = self._write_predictions(trainer, root)
        results: Results = pl_module.results  # type: ignore[assignment]
        for task in self._rows:
            score = float(trainer.callback_metrics[f"test/{task}/{results.metrics[task]}"])
            if stage is None:
                results.matrix.set_zero_shot(task, score)
            else:
                results.matrix.set(stage.row, task, score)
        if stage is not None:
            cost = results.cost_row(stage.name, stage.folder, stage.row)
            cost.eval_seconds, cost.eval_samples_per_second = seconds, samples / seconds
            share: dict[str, float] = pl_module.eval_seconds  # type: ignore[assignment]
            own = max(1, sum(len(rows) for rows in self._rows.values()))
            cost.routing_seconds_per_sample = share["routing"] / own
            cost.generation_seconds_per_sample = share["generation"] / own
            examined: int = pl_module.eval_examined  # type: ignore[assignment]
            cost.first_routing_seconds_per_sample = share["first_routing"] / examined if examined else None
            routing = None
            if trainer.is_global_zero:
                learnt = results.tasks[: stage.row + 1]
                routing = routing_summary(root, stage.folder, list(self._rows), learnt)
            if routing is not None:
                before = results.routing or {}
                results.routing = {
                    **routing,
                    "per_stage": {**before.get("per_stage", {}), stage.name: routing["accuracy"]},
                    "rejected_per_stage": {**before.get("rejected_per_stage", {}), stage.name: routing["rejected"]},
                }
        if trainer.is_global_zero:
            _enter_structure(results, pl_module.structure, pl_module.towers)  # type: ignore[arg-type]
            self._publish(trainer, root, results, stage)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Print the table, when the progress bar of the evaluation is closed."""
        if stage == "test" and self._report is not None:
            Console().print(stage_table(self._report))
            self._report = None

    def _write_predictions(self, trainer: L.Trainer, root: Path) -> int:
        """Number of rows that all ranks together evaluated."""
        folder = Path(trainer.default_root_dir).name
        for task, rows in self._rows.items():
            write_part(prediction_file(root, folder, task), trainer.global_rank, rows)
        trainer.strategy.barrier()
        count, problem = 0, ""
        if trainer.is_global_zero:
            try:
                for (task, _), expected in zip(self._rows.items(), _expected(trainer), strict=True):
                    count += merge_parts(prediction_file(root, folder, task), trainer.world_size, expected)
            except RuntimeError as error:
                problem = str(error)
        count, problem = trainer.strategy.broadcast((count, problem))  # so that no rank waits for one that has given up
        if problem:
            raise RuntimeError(problem)
        return count

    def _publish(self, trainer: L.Trainer, root: Path, results: Results, stage: Stage | None) -> None:
        """Everything that people and scripts read; rank zero only."""
        results.save(root)
        config = root / "config.yaml"
        images = _Images(trainer.datamodule)  # type: ignore[attr-defined]
        write_report(root, results, config.read_text(encoding="utf-8") if config.is_file() else "", images)
        # last, because a curve's point cannot be taken back if the run is killed before this stage is marked as done
        for logger in trainer.loggers:
            if isinstance(logger, StageTensorBoardLogger):
                logger.log_forgetting(results, 0 if stage is None else stage.row + 1)
        self._report = results


class _Images:
    """Finds the picture of a test row, for the report."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def __call__(self, task: str, index: int) -> Path | Image.Image | None:
        split = self.stream.split(task, "test")
        position = bisect_left(range(len(split)), index, key=lambda place: split[place].row)
        if position == len(split) or not split[position].images:
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


def _expected(trainer: L.Trainer) -> list[int | None]:
    """Rows of each test split; None where the Trainer was told to stop early."""
    loaders: Any = trainer.test_dataloaders
    limit = trainer.limit_test_batches
    whole = isinstance(limit, float) and limit == 1.0  # the int 1 means one batch
    return [len(loader.dataset) if whole else None for loader in loaders]
