"""A finished or unfinished run, brought back to answer questions or to be exported."""

import logging
from dataclasses import dataclass
from pathlib import Path

from mcit_lightning.backbone import load_backbone
from mcit_lightning.checkpoints import read_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.engine import resolve_precision
from mcit_lightning.evaluation.results import RESULTS_FILE, Results
from mcit_lightning.loading import load_config
from mcit_lightning.module import MCITModule
from mcit_lightning.registry import nearest
from mcit_lightning.stages import Stage
from mcit_lightning.validation import build_strategy

logger = logging.getLogger(__name__)


@dataclass
class Trained:
    """The model of a run as it was after a stage.

    Args:
        module: the model with its strategy, in evaluation mode, on the CPU.
        config: the run's configuration.
        stage: the stage after which it is.
        root: the run directory.
    """

    module: MCITModule
    config: ExperimentConfig
    stage: Stage
    root: Path

    @property
    def results(self) -> Results | None:
        """What the run has measured; None before its first evaluation."""
        return Results.load(self.root) if (self.root / RESULTS_FILE).is_file() else None


def load_trained(root: Path, stage: str | None = None) -> Trained:
    """Load the model of a run directory.

    Args:
        root: the run directory.
        stage: name of a stage; None is the last one whose training is done.

    Raises:
        ValueError: there is no run, no such stage, or a file of it is damaged; names the remedy.
    """
    file = root / "config.yaml"
    if not file.is_file():
        raise ValueError(f"{root}: is no run directory, it holds no config.yaml; name one, for example runs/quickstart")
    config = load_config(file)
    strategy = build_strategy(config.strategy)
    stages = strategy.stages(config.order)
    done = [each for each in stages if (root / each.folder / "final.ckpt").is_file()]
    if not done:
        raise ValueError(f"{root}: no stage of this run is trained yet (no stage_*/final.ckpt); run it first")
    names = [each.name for each in done]
    if stage is not None and stage not in names:
        raise ValueError(f"--stage: {stage!r} is no trained stage of {root}. {nearest(stage, names)}")
    chosen = done[-1] if stage is None else done[names.index(stage)]
    backbone = load_backbone(config.backbone, precision=resolve_precision(config.trainer))
    module = MCITModule(backbone, strategy, config)
    path = root / chosen.folder / "final.ckpt"
    try:
        module.load_weights(read_checkpoint(path))
    except ValueError as error:
        raise ValueError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    logger.info("%s after stage %s", root, chosen.name)
    return Trained(module.eval(), config, chosen, root)
