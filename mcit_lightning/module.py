"""`MCITModule`: a LLaVA-style model with a pluggable continual strategy, as a LightningModule."""

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from typing_extensions import Self

from mcit_lightning.backbone import Backbone
from mcit_lightning.compilation import compile_decoder, eagerly
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.collate import AsksItself
from mcit_lightning.data.encode import Encoder
from mcit_lightning.evaluation.metrics import AnswerMetric, task_metric
from mcit_lightning.evaluation.results import Results
from mcit_lightning.feature_cache import CachedTower, cached_tower
from mcit_lightning.generation import generate_answers
from mcit_lightning.loss import Batch
from mcit_lightning.optimization import build_optimizer, build_schedule, epoch_steps
from mcit_lightning.plans import FreezeRecord, StructureLog, TaskPlan
from mcit_lightning.sharding import most_rounds, shard_decoder
from mcit_lightning.stages import Stage
from mcit_lightning.strategies import ContinualStrategy

logger = logging.getLogger(__name__)


class MCITModule(L.LightningModule):
    """The only owner of structure and weights.

    It grows by `TaskPlan`s, keeps them in an append-only log, saves adapters (with the projector and the strategy's own state)
    and the log, and restores by replaying the log before the weights load.

    Args:
        backbone: model, processor and towers, frozen.
        strategy: the continual-learning method.
        config: the experiment.
        run_id: identity of the run; checkpoints of another run are refused.
    """

    results: Results

    def __init__(
        self, backbone: Backbone, strategy: ContinualStrategy, config: ExperimentConfig, run_id: str = ""
    ) -> None:
        super().__init__()
        self.model = backbone.model
        self.strategy = strategy
        self.towers = backbone.towers
        self.processor = backbone.processor
        self.config = config
        self.run_id = run_id
        self.structure = StructureLog()
        self._replayed: set[str] = set()
        self.eval_cost = _nothing_spent()
        self._rounds_left = 0
        self._last_batch: Batch | None = None
        self.answer_metrics: dict[str, AnswerMetric] = {}
        self.tower_cache: CachedTower | None = None
        self.strict_loading = False  # checkpoints hold adapters only; on_load_checkpoint compares the key sets instead
        strategy.seed, strategy.tunes_projector = config.seed, config.backbone.train_projector
        if isinstance(strategy, AsksItself):
            strategy.use_prompts(Encoder(backbone.processor, config.prompt), config.tasks)
        if config.backbone.train_projector:
            for path in self.towers.projector:
                self.model.get_submodule(path).float()  # trains in float32 even where the frozen base is bfloat16
        self._pretrained_projector = {
            name: parameter.detach().cpu().clone()
            for name, parameter in self.model.named_parameters()
            if self._in_projector(name)
        }

    # ------------------------------------------------------------------------------------------------------------ structure

    @property
    def stage(self) -> Stage:
        """The stage that the data module streams."""
        return self.trainer.datamodule.stage  # type: ignore[attr-defined]

    def grow(self, plan: TaskPlan) -> None:
        """Build what a plan says and log it. A plan of a stage that has been carried out already is not carried out again."""
        if self.structure.plan(plan.stage) is None:
            self.strategy.grow(self.towers, plan)
            self.structure.append(plan)

    def freeze_branches(self, record: FreezeRecord) -> None:
        """Carry out a freeze record and log it."""
        self.strategy.freeze(self.towers, record)
        self.structure.append(record)

    def replay(self, items: list[dict[str, Any]]) -> None:
        """Rebuild the structure that a checkpoint's log describes; entries that are there already are skipped.

        Raises:
            ValueError: the log contradicts the structure that this module has.
        """
        log = StructureLog.from_list(items)
        if self.structure.to_list() != log.to_list()[: len(self.structure)]:
            raise ValueError("the checkpoint's structure log contradicts the model's; it belongs to another run")
        for entry in log.entries[len(self.structure) :]:
            self._replayed.add(entry.stage)
            self.grow(entry) if isinstance(entry, TaskPlan) else self.freeze_branches(entry)

    def is_restored(self, stage: Stage) -> bool:
        """Whether the stage's start was carried out by an interrupted process: its structure comes from a checkpoint."""
        return stage.name in self._replayed

    def reset(self) -> None:
        """Back to the pretrained model: no adapters, the projector as it was loaded, an empty log."""
        self.towers.detach_all()
        self.structure = StructureLog()
        self._replayed.clear()
        with torch.no_grad():
            for name, value in self._pretrained_projector.items():
                self.model.get_parameter(name).copy_(value)

    def setup(self, stage: str) -> None:
        """Before training: carry out the default plan if no callback decided one, and set what trains."""
        self.tower_cache = cached_tower(
            self.towers,
            self.config.data,
            Path(self.trainer.default_root_dir).parent / "features",
            self.trainer.world_size,
            targets=getattr(self.strategy.config, "targets", {}),
            read=self.strategy.reads_tower,
        )
        if stage != "fit":
            return
        if self.structure.plan(self.stage.name) is None:
            self.grow(self.strategy.plan(self.stage, self.towers))
        self.requires_grad_(False)
        trained = list(self.strategy.trainable(self.towers, self.stage))
        if self.config.backbone.train_projector:
            trained += [self.model.get_parameter(name) for name in self._pretrained_projector]
        if not trained:
            raise ValueError(
                f"strategy {self.config.strategy['name']!r} trains no parameter in stage {self.stage.name!r}"
            )
        for parameter in trained:
            parameter.requires_grad_(True)
        if self.config.backbone.compile is not None:
            compile_decoder(self.towers, self.config.backbone.compile)
        if self.global_rank == 0:
            plan = self.structure.plan(self.stage.name)
            if plan is not None and plan.ranks:
                logger.info("adapters from stage %s on:\n%s", self.stage.name, self.towers.describe())
            logger.info("stage %s trains %s parameters", self.stage.name, f"{sum(p.numel() for p in trained):,}")

    def _pictures(self, batch: Batch, *, again: bool = True) -> AbstractContextManager[None]:
        """Context of a batch for the tower; pictures that are seen again come from the store, if there is one."""
        if self.tower_cache is None:
            return nullcontext()
        if self.tower_cache.store is None or not again:
            return self.tower_cache.pictures()
        keys = batch.get("picture_keys")
        if keys is None and any(batch["num_images"]) and self.config.data.feature_cache == "always":
            raise ValueError(
                f"data.feature_cache: is 'always', but {type(self.model).__name__} does not take one picture or tile per row. "
                "Set it to auto or never"
            )
        return self.tower_cache.pictures(keys)

    def cpu(self) -> Self:
        """What Lightning does at the end of each fit and test. A quantised base stays: moving it costs memory and time."""
        return self if self.config.backbone.quantization is not None else super().cpu()

    def configure_model(self) -> None:
        """Under FSDP2, spread the decoder over the processes, once. Lightning calls this before every fit and test."""
        if self.device_mesh is not None:
            shard_decoder(self.towers, self.device_mesh["data_parallel"])

    # ------------------------------------------------------------------------------------------------------------- training

    def on_train_start(self) -> None:
        """from_pretrained returns eval mode, in which transformers skips activation checkpointing; frozen towers stay in eval."""
        self.model.train()
        if not any(parameter.requires_grad for parameter in self.model.get_submodule(self.towers.vision).parameters()):
            self.model.get_submodule(self.towers.vision).eval()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch, [] (a scalar)."""
        again = (self.trainer.max_epochs or 1) > 1
        with self._pictures(batch, again=again), self.strategy.routing(self.towers, batch, self.stage.name):
            output = self.strategy.loss(self.model, batch, self.stage)
        if not output.loss.requires_grad:  # nothing in this batch reaches a trained parameter, for example no image
            trained = (parameter.sum() for parameter in self.parameters() if parameter.requires_grad)
            output.loss = output.loss + sum(0.0 * value for value in trained)
        size = len(batch["id"])
        self.log("train/loss", output.loss.detach(), prog_bar=True, batch_size=size)
        for name, value in output.parts.items():
            self.log(f"train/{name}", value.detach(), batch_size=size)
        length = batch["inputs"]["input_ids"].shape[1]
        self.log("train/tokens", float(batch["num_tokens"]), batch_size=size)
        self.log("train/length", float(length), batch_size=size)
        self.log("train/padding", 1.0 - batch["num_tokens"] / (size * length), batch_size=size)
        for name in ("shortened", "dropped"):
            self.log(
                f"train/{name}",
                float(batch[name]),
                on_step=False,
                on_epoch=True,
                reduce_fx="sum",
                sync_dist=True,
                batch_size=size,
            )
        for group in self.trainer.optimizers[0].param_groups:
            self.log(f"lr/{group['name']}", group["lr"], batch_size=size)
        return output.loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Validation loss of the stage's tasks."""
        self._note(batch)
        size = len(batch["id"])
        self._validated += torch.stack([self._loss(batch) * size, torch.tensor(float(size), device=self.device)])

    def _loss(self, batch: Batch) -> Tensor:
        with self._pictures(batch), self.strategy.routing(self.towers, batch, self.stage.name):
            return self.strategy.loss(self.model, batch, self.stage).loss

    def on_validation_start(self) -> None:
        """Agree on the number of batches, where all processes must run equally many."""
        self._rounds_left = most_rounds(int(sum(self.trainer.num_val_batches)), self.towers)
        self._validated = torch.zeros(2, device=self.device)

    def on_validation_epoch_end(self) -> None:
        """Log `val/loss`, the mean over the samples of all processes."""
        self._catch_up(self._loss)
        total = self.trainer.strategy.reduce(self._validated, reduce_op="sum")
        self.log("val/loss", total[0] / total[1], prog_bar=True, sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """AdamW with named groups; warm-up and decay over the optimizer steps of this stage."""
        tasks = self.stage.train
        task_lr = self.config.tasks[tasks[0]].lr if len(tasks) == 1 else None
        if len(tasks) > 1 and any(self.config.tasks[task].lr for task in tasks) and self.global_rank == 0:
            logger.warning(
                "stage %s trains several tasks at once: optim.lr is used, not the tasks' own rates", self.stage.name
            )
        optimizer = build_optimizer(self.named_parameters(), self._group_of, self.config.optim, task_lr=task_lr)
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        # not `trainer.estimated_stepping_batches`: it makes a resumed loader start over
        batches, limit = len(stream.train_dataloader()), self.trainer.limit_train_batches
        per_epoch = epoch_steps(batches, limit, self.trainer.accumulate_grad_batches)
        schedule = build_schedule(optimizer, self.config.optim, max(1, per_epoch * stream.epochs(self.stage)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _group_of(self, name: str) -> str:
        if name.startswith("strategy."):
            return "strategy"
        return self.towers.tower_of(name.removeprefix("model.")) or "language"

    # ----------------------------------------------------------------------------------------------------------- evaluation

    def on_test_start(self) -> None:
        """Fresh metrics for the tasks that are about to be evaluated, and the number of batches as for validation."""
        self._rounds_left = most_rounds(int(sum(self.trainer.num_test_batches)), self.towers)
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        self.eval_cost = _nothing_spent()
        self.answer_metrics = {task: task_metric(self.config.tasks[task]).to(self.device) for task in stream.test_tasks}

    def test_step(  # type: ignore[override]
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> list[dict[str, Any]]:
        """Generate and score answers; returns one prediction record per row (see `callbacks.BackwardTransfer`)."""
        self._note(batch)
        task, texts = batch["task"][0], self._answer(batch)
        metric, routed = self.answer_metrics[task], self.strategy.routed_to()
        metric.update(texts, batch["reference"], batch["extra"])
        scores = metric.scores(texts, batch["reference"], batch["extra"])
        return [
            {
                "index": batch["index"][row],
                "question_id": batch["extra"][row].get("question_id", batch["id"][row]),  # a number stays a number
                "prompt": batch["prompt"][row],
                "text": text,
                "answer": batch["reference"][row],
                "score": scores[row],
                "task": task,
                "answer_id": f"{self.run_id}-{batch['id'][row]}",
                "model_id": self.config.name,
                "metadata": {},
                **({} if routed is None else {"routed_to": routed[row]}),
            }
            for row, text in enumerate(texts)
        ]

    def _answer(self, batch: Batch) -> list[str]:
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        task, end_id = batch["task"][0], stream.train_collator.encoder.end_id
        least, most = self.config.tasks[task].min_new_tokens, stream.max_new_tokens(task)
        began, examined = self._clock(), self.strategy.samples_examined
        with self._pictures(batch), self.strategy.routing(self.towers, batch, None), self.towers.generating():
            routed_at = self._clock()
            with eagerly(self.config.backbone.compile):
                inputs = self.strategy.inputs(batch)
                texts = generate_answers(
                    self.model, self.processor, inputs, most, end_id, least, lockstep=self.towers.sharded
                )
        self.eval_cost["routing"] += routed_at - began
        if examined := self.strategy.samples_examined - examined:
            self.eval_cost["first_routing"] += routed_at - began
            self.eval_cost["examined"] += examined
        self.eval_cost["generation"] += self._clock() - routed_at
        return texts

    def _note(self, batch: Batch) -> None:
        """Count an evaluation batch, and keep it where another process may have one more."""
        self._rounds_left -= 1
        self._last_batch = batch if self.towers.sharded else None

    def _catch_up(self, step: Callable[[Batch], object]) -> None:
        """Run the last batch again, to no effect, as often as another process has a batch more (see `sharding`)."""
        for _ in range(self._rounds_left if self.towers.sharded else 0):
            assert self._last_batch is not None
            with self.trainer.precision_plugin.forward_context():
                step(self._last_batch)
        self._last_batch = None

    def _clock(self) -> float:
        """Seconds, when the device has done what it was asked to."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_test_epoch_end(self) -> None:
        """Log `test/<task>/<metric>` in percent; the metrics sum over ranks themselves."""
        self._catch_up(self._answer)
        stream = self.trainer.datamodule  # type: ignore[attr-defined]
        values = {
            f"test/{task}/{stream.metric(task)}": metric.compute() for task, metric in self.answer_metrics.items()
        }
        # not to TensorBoard: a test after a skipped fit would land on another step; BackwardTransfer logs by stage instead
        self.log_dict(values, logger=False, sync_dist=False, rank_zero_only=False)

    # ---------------------------------------------------------------------------------------------------------- checkpoints

    def saved_keys(self) -> set[str]:
        """Names in `state_dict()` that belong in a checkpoint: adapters, the projector if it trains, the strategy's state."""
        keys = {
            f"model.{path}.{name}"
            for path, layer in self.towers.adapters.items()
            for name, _ in layer.adapter_parameters()
        }
        if self.config.backbone.train_projector:
            keys |= {f"model.{name}" for name in self._pretrained_projector}
        return keys | {f"strategy.{name}" for name in self.strategy.state_dict()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was tuned, and add what is needed to rebuild the structure."""
        keys = self.saved_keys()
        checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in keys}
        checkpoint["mcit"] = {
            "format": 1,
            "run_id": self.run_id,
            "structure": self.structure.to_list(),
            "stage": self.stage.name,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Replay the structure and check that the file fits it exactly.

        Raises:
            ValueError: the file is of another run or format, or its keys differ from the structure's.
        """
        about = checkpoint.get("mcit")
        if not isinstance(about, dict) or about.get("format") != 1:
            raise ValueError("the file is not a checkpoint of mcit_lightning (no 'mcit' entry of format 1)")
        if self.run_id and about["run_id"] != self.run_id:
            raise ValueError(f"the checkpoint belongs to run {about['run_id']}, this is run {self.run_id}")
        self.replay(about["structure"])
        expected, found = self.saved_keys(), set(checkpoint["state_dict"])
        if expected != found:
            raise ValueError(
                "the checkpoint does not match the planned structure: "
                f"missing {sorted(expected - found)[:5]}, unexpected {sorted(found - expected)[:5]}"
            )

    def load_weights(self, checkpoint: dict[str, Any]) -> None:
        """`on_load_checkpoint` and the weights, outside of a fit. Raises as there, and ValueError for a wrong shape."""
        self.on_load_checkpoint(checkpoint)
        try:
            self.load_state_dict(checkpoint["state_dict"], strict=False)
        except RuntimeError as error:
            raise ValueError(f"the checkpoint does not match the planned structure: {error}") from error

    def _in_projector(self, name: str) -> bool:
        return self.towers.tower_of(name) == "projector"


def _nothing_spent() -> dict[str, float]:
    """What an evaluation spends: seconds, and the number of samples that a router examined."""
    return {"routing": 0.0, "first_routing": 0.0, "generation": 0.0, "examined": 0.0}
