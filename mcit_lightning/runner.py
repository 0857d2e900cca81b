"""Run an experiment: a fresh Trainer per stage, evaluation after it, and resumption from what is on the disk.

The runner knows no algorithm. What must outlive a stage is in the module (structure, weights) or on the disk (`state.json`,
`results.json`, checkpoints); trainers and callbacks are made anew for every stage.
"""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint, ProgressBar

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.engine import build_engine, resolve_precision
from mcit_lightning.evaluation.results import Results
from mcit_lightning.instantiate import split_node
from mcit_lightning.loggers import StageTensorBoardLogger
from mcit_lightning.module import MCITModule
from mcit_lightning.rundir import RunDirectory, read_checkpoint
from mcit_lightning.stages import Stage
from mcit_lightning.validation import build_strategy

logger = logging.getLogger(__name__)


def run(config: ExperimentConfig) -> Results:
    """Train and evaluate the whole sequence, or continue where the run directory stands.

    Returns:
        The accuracy matrix and everything else that is in `results.json`.

    Raises:
        ValueError: bad input of any kind; names file, key, value and remedy.
        OSError: the run directory cannot be written.
    """
    directory = RunDirectory(config)
    try:
        return _Run(config, directory).execute()
    except OSError as error:
        error.filename = error.filename or str(directory.root)  # a full disk does not always name the file
        raise
    finally:
        directory.close()


class _Run:
    """The objects that all stages of one run share."""

    def __init__(self, config: ExperimentConfig, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        L.seed_everything(config.seed, workers=True, verbose=False)
        if config.prepare is not None:
            target, kwargs = split_node(config.prepare, "prepare")
            target(root=Path(config.data.root), **kwargs)
        self.precision = resolve_precision(config.trainer)
        strategy = build_strategy(config.strategy)
        self.stages = strategy.stages(config.order)
        backbone = load_backbone(config.backbone, precision=self.precision)
        self.module = MCITModule(backbone, strategy, config, directory.state.run_id)
        self.stream = ContinualDataModule(config, backbone.processor, self.stages)
        self.module.results = self._results()
        self.tensorboard = StageTensorBoardLogger(directory.root)

    def execute(self) -> Results:
        """All stages that are not finished yet."""
        state = self.directory.state
        if not state.zero_shot and (self.config.zero_shot or not self.stages):
            self.stream.evaluate_only(self.config.order)
            self._trainer(self.directory.root / "zero_shot").test(self.module, datamodule=self.stream, verbose=False)
            state.zero_shot = True
            self.directory.save()
        for stage in self.stages[state.stage :]:
            self._restore(stage)
            steps = self._stage(stage)
            state.steps.append(steps)
            self.directory.save()
        state.finished = True
        self.directory.save()
        self.tensorboard.close()
        return self.module.results

    def _stage(self, stage: Stage) -> int:
        """Train unless that is done, and evaluate; returns the stage's optimizer steps."""
        self.stream.stage = stage.index
        self.tensorboard.step_offset = sum(self.directory.state.steps)
        L.seed_everything(self.config.seed + stage.index, workers=True, verbose=False)
        last, final = self.directory.last(stage), self.directory.final(stage)
        trainer = self._trainer(self.directory.stage_folder(stage), self.stream.epochs(stage))
        if final is None:
            checkpoint = None if last is None else read_checkpoint(last)
            self.tensorboard.resume_from(0 if checkpoint is None else checkpoint["global_step"])
            if checkpoint is not None:
                self.module.on_load_checkpoint(checkpoint)  # structure first: callbacks decide by it in their setup
                logger.info("stage %s continues at step %d (%s)", stage.name, checkpoint["global_step"], last)
            trainer.fit(self.module, datamodule=self.stream, ckpt_path=last)
        trainer.test(self.module, datamodule=self.stream, verbose=False)
        final = self.directory.final(stage)
        assert final is not None, "StageCheckpoint writes final.ckpt at the end of training"
        return int(read_checkpoint(final)["global_step"])

    def _restore(self, stage: Stage) -> None:
        """Bring the module to the state in which the stage starts, or in which its evaluation does."""
        final = self.directory.final(stage)
        if stage.reset and final is None:
            self.module.reset()
            return
        previous = self.directory.final(self.stages[stage.index - 1]) if stage.index > 0 else None
        source = final or previous
        if source is None or (len(self.module.structure) > 0 and final is None):
            return  # the first stage, or the module has just trained the previous one
        if stage.reset:
            self.module.reset()
        logger.info("restoring %s", source)
        try:
            self.module.load_weights(read_checkpoint(source))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def _trainer(self, folder: Path, epochs: int = 1) -> L.Trainer:
        """A fresh Trainer with fresh callbacks."""
        callbacks = [build(**kwargs) for build, kwargs in self._callback_nodes()]
        if not any(isinstance(callback, Checkpoint) for callback in callbacks):
            raise ValueError("callbacks: none writes checkpoints; add {_target_: callbacks.StageCheckpoint}")
        arguments: dict[str, Any] = {
            "num_sanity_val_steps": 0,
            "enable_model_summary": False,
            **self.config.trainer,
            "precision": self.precision,
            "strategy": build_engine(self.config.trainer, find_unused=self._find_unused()),
        }
        if arguments.get("enable_progress_bar") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        return L.Trainer(
            **arguments,
            callbacks=callbacks,
            logger=self.tensorboard,
            default_root_dir=folder,
            max_epochs=epochs,
            use_distributed_sampler=False,
        )

    def _callback_nodes(self) -> list[tuple[Any, dict[str, Any]]]:
        return [split_node(node, f"callbacks[{index}]") for index, node in enumerate(self.config.callbacks)]

    def _find_unused(self) -> bool:
        """DDP must look for parameters without a gradient if a batch may come without any image, or the strategy routes."""
        return not self.module.strategy.uses_all_parameters or self.stream.has_text_only()

    def _results(self) -> Results:
        """The results so far, or empty ones."""
        config = self.config
        if (self.directory.root / "results.json").is_file() and not config.overwrite:
            return Results.load(self.directory.root)
        return Results(
            experiment=config.name,
            strategy=str(config.strategy["name"]),
            backbone=config.backbone.id,
            seed=config.seed,
            tasks=list(config.order),
            metrics={name: config.tasks[name].metric for name in config.order},
        )
