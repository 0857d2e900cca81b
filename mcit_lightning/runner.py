"""Run an experiment: a fresh Trainer per stage, evaluation after it, and resumption from what is on the disk.

The runner knows no algorithm. What must outlive a stage is in the module (structure, weights) or on the disk (`state.json`,
`results.json`, checkpoints); trainers and callbacks are made anew for every stage.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from mcit_lightning.backbone import load_backbone
from mcit_lightning.checkpoints import SealedCheckpointIO, read_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.data.presence import require_files
from mcit_lightning.engine import engine_arguments, resolve_precision
from mcit_lightning.errors import first_line
from mcit_lightning.evaluation.held_out import HeldOut
from mcit_lightning.evaluation.results import Results
from mcit_lightning.instantiate import split_node
from mcit_lightning.launch import check_launch, cluster_plugins, rank_zero_first
from mcit_lightning.loggers import StageTensorBoardLogger
from mcit_lightning.module import MCITModule
from mcit_lightning.rundir import EVALUATE_AGAIN, RunDirectory
from mcit_lightning.signals import STOP
from mcit_lightning.stage_logger import build_loggers
from mcit_lightning.stages import ZERO_SHOT, Stage
from mcit_lightning.stopping import StopAtSignal
from mcit_lightning.validation import build_strategy

logger = logging.getLogger(__name__)


def run(config: ExperimentConfig) -> Results:
    """Train and evaluate the whole sequence, or continue where the run directory stands.

    Returns:
        The accuracy matrix and everything else that is in `results.json`.

    Raises:
        ValueError: bad input of any kind; names file, key, value and remedy.
        OSError: the run directory cannot be written.
        StoppedBySignal: SIGTERM or SIGUSR1 has come and what was trained is saved; the same call continues.
    """
    check_launch(config.trainer)
    with rank_zero_first():  # it may delete an old run that the others must not read
        directory = RunDirectory(config)
    try:
        with STOP.listening():
            return _Run(config, directory).execute()
    except RuntimeError:
        STOP.check()  # a signal to a whole process group breaks what it waits for: loaders, other ranks
        raise
    except OSError as error:
        if not str(error.filename or "").startswith(str(directory.root)):
            error.filename = str(directory.root)  # a full disk does not always name the file, or names a temporary one
        raise
    finally:
        directory.close()


class _Run:
    """The objects that all stages of one run share."""

    def __init__(self, config: ExperimentConfig, directory: RunDirectory) -> None:
        self.config, self.directory = config, directory
        L.seed_everything(config.seed, workers=True, verbose=False)
        self.precision = resolve_precision(config.trainer)
        self.find_unused = True
        self.tensorboard = StageTensorBoardLogger(directory.root)
        self.loggers = build_loggers(config.loggers, directory.root)
        # wrong values under `trainer` or `callbacks` show before anything is loaded
        device = self._trainer(directory.root).strategy.root_device
        if config.prepare is not None:
            target, kwargs = split_node(config.prepare, "prepare")
            target(root=Path(config.data.root), **kwargs)
        strategy = build_strategy(config.strategy)
        self.stages = strategy.stages(config.order)
        require_files(config, self.stages)
        backbone = load_backbone(config.backbone, precision=self.precision, device=device)
        strategy.check(backbone.towers, self.stages)  # and so do targets that the model does not have
        self.module = MCITModule(backbone, strategy, config, directory.state.run_id)
        self.stream = ContinualDataModule(config, backbone.processor, self.stages)
        # DDP must look for parameters without a gradient if a batch may come without any image, or the strategy routes
        self.find_unused = not strategy.uses_all_parameters or self.stream.has_text_only()
        self.module.results = self._results()

    def execute(self) -> Results:
        """All stages that are not finished yet."""
        state = self.directory.state
        if not state.zero_shot and (self.config.zero_shot or not self.stages):
            self.stream.evaluate_only([*self.config.order, *self.config.held_out])
            self._test(self._trainer(self.directory.root / ZERO_SHOT))
            state.zero_shot = True
            self.directory.save()
        self.directory.prepare_to_continue(self.stages)
        for stage in self.stages[state.stage :]:
            trained = self._restore(stage)
            state.steps.append(self._stage(stage, trained))
            self.directory.save()
            STOP.check()
        state.finished = True
        self.directory.save()
        cache = self.module.tower_cache
        if cache is not None and cache.store is not None and self.module.global_rank == 0:
            cache.store.clear()
        self.tensorboard.close()
        return self.module.results

    def _stage(self, stage: Stage, trained: int | None) -> int:
        """Train unless that is done (in `trained` steps), and evaluate; returns the stage's optimizer steps."""
        self.stream.stage = stage.index
        self.tensorboard.step_offset = offset = sum(self.directory.state.steps)
        for each in self.loggers:
            each.step_offset = offset
        L.seed_everything(self.config.seed + stage.index, workers=True, verbose=False)
        last = self.directory.last(stage)
        trainer = self._trainer(self.directory.stage_folder(stage), self.stream.epochs(stage))
        if trained is None:
            step = 0
            if last is not None:
                # before callbacks decide by the structure
                checkpoint = read_for(last, stage, self.module.load_weights)
                step = checkpoint["global_step"]
                logger.info("stage %s continues at step %d (%s)", stage.name, step, last)
            self.tensorboard.resume_from(step)
            trainer.fit(self.module, datamodule=self.stream, ckpt_path=last, weights_only=True)
            STOP.check()  # a signal in the last batch
            trained = trainer.global_step
        self._test(trainer)
        return trained

    def _test(self, trainer: L.Trainer) -> None:
        trainer.test(self.module, datamodule=self.stream, verbose=False)

    def _restore(self, stage: Stage) -> int | None:
        """Bring the module to the state in which the stage starts, or in which its evaluation does.

        Returns:
            The optimizer steps of the stage if its training is done, else None.
        """
        if stage.reset:
            self.module.reset()
        final = self.directory.final(stage)
        if final is not None:  # killed after the training
            return int(read_for(final, stage, self.module.load_weights)["global_step"])
        if self.directory.last(stage) is not None:
            return None
        if stage.index > 0 and not stage.reset and len(self.module.structure) == 0:  # not just trained in this process
            previous = self.stages[stage.index - 1]
            path = self.directory.final(previous)
            assert path is not None, "finished stages have one"
            read_for(path, previous, self.module.load_weights)
        return None

    def _trainer(self, folder: Path, epochs: int = 1) -> L.Trainer:
        """A fresh Trainer with fresh callbacks.

        Raises:
            ValueError: Lightning refuses a value of the `trainer` section, or a callback one of its arguments.
        """
        try:
            callbacks = [StopAtSignal(), *(target(**kwargs) for target, kwargs in self._callback_nodes())]
            arguments: dict[str, Any] = {
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
                **self.config.trainer,
                "precision": self.precision,
                "plugins": [SealedCheckpointIO(), *cluster_plugins()],
                **engine_arguments(self.config.trainer, find_unused=self.find_unused),
            }
            if arguments.get("enable_progress_bar") is False:
                callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
            return L.Trainer(
                **arguments,
                callbacks=callbacks,
                logger=[self.tensorboard, *self.loggers],
                default_root_dir=folder,
                max_epochs=epochs,
                use_distributed_sampler=False,
            )
        except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
            text = first_line(error)
            raise ValueError(f"trainer or callbacks: a value is refused: {text}") from error

    def _callback_nodes(self) -> list[tuple[Any, dict[str, Any]]]:
        return [split_node(node, f"callbacks[{index}]") for index, node in enumerate(self.config.callbacks)]

    def _results(self) -> Results:
        """The results so far, or empty ones.

        Raises:
            ValueError: stages are finished but their results are lost or damaged.
        """
        config, state = self.config, self.directory.state
        path = self.directory.root / "results.json"
        if path.is_file():
            try:
                return Results.load(self.directory.root)
            except ValueError as error:
                raise ValueError(f"{str(error).rstrip('.')}. {EVALUATE_AGAIN}") from error
        if state.steps or state.zero_shot:
            raise ValueError(f"{path}: is missing, but {len(state.steps)} stages are finished. {EVALUATE_AGAIN}")
        return Results(
            experiment=config.name,
            strategy=str(config.strategy["name"]),
            backbone=config.backbone.id,
            seed=config.seed,
            tasks=list(config.order),
            metrics={name: config.tasks[name].metric for name in config.order},
            held_out=HeldOut({name: config.tasks[name].metric for name in config.held_out}),
        )


def read_for(path: Path, stage: Stage, use: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Read a checkpoint of a stage and give it to `use`.

    Raises:
        ValueError: it cannot be read, is of another stage, or does not fit; names the file and the remedy.
    """
    checkpoint = read_checkpoint(path)
    try:
        if checkpoint["mcit"].get("stage") != stage.name:
            raise ValueError(f"is of stage {checkpoint['mcit'].get('stage')!r}, not of {stage.name!r}")
        checkpoint["global_step"] = int(checkpoint["global_step"])
        use(checkpoint)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError, AssertionError) as error:
        # its checksum is right, so another program or version wrote what does not fit
        what = str(error) if isinstance(error, ValueError) else f"does not fit ({type(error).__name__}: {error})"
        raise ValueError(
            f"{path}: {what}. Put the right file there, or delete it: the stage is then done again"
        ) from error
    logger.info("restored from %s", path)
    return checkpoint
