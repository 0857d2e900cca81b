"""The experiment of a command that reads its data."""

import argparse
from pathlib import Path

from mcit_lightning.commands.quiet import quiet_libraries
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.instantiate import split_node
from mcit_lightning.loading import find_experiment, load_config


def load_prepared(options: argparse.Namespace) -> ExperimentConfig:
    """The experiment that the arguments name, its data written by `prepare` where it has that.

    Raises:
        ValueError: the experiment is wrong.
    """
    config = load_config(find_experiment(options.experiment), options.overrides)
    quiet_libraries()
    if config.prepare is not None:
        target, kwargs = split_node(config.prepare, "prepare")
        target(root=Path(config.data.root), **kwargs)
    return config
