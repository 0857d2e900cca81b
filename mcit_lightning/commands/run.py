"""`mcit-lightning EXPERIMENT [key=value ...]`: run an experiment, continue it where it stopped, or plan it (`dry_run=true`)."""

import argparse

from mcit_lightning.commands import add_experiment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The experiment and its overrides."""
    add_experiment(parser)


def command(options: argparse.Namespace) -> int:
    """Run or plan the experiment.

    Raises:
        ValueError: bad input of any kind; names file, key, value and remedy.
        OSError: the run directory cannot be written.
    """
    from mcit_lightning.loading import find_experiment, load_config

    config = load_config(find_experiment(options.experiment), options.overrides)
    if config.dry_run:
        from mcit_lightning.dry_run import show

        show(config)
        return 0
    from mcit_lightning.commands.quiet import quiet_libraries
    from mcit_lightning.runner import run

    quiet_libraries()
    run(config)
    return 0
