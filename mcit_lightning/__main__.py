"""`mcit-lightning EXPERIMENT [key=value ...]`: run an experiment, or continue it where it stopped."""

import argparse
import errno
import logging
import os
import sys
import warnings

from mcit_lightning import __version__

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: 0, 2 for bad input, 3 for a full or read-only disk, 130 after Ctrl-C, 143 after SIGTERM.
    """
    parser = argparse.ArgumentParser(
        prog="mcit-lightning",
        description="Train and evaluate a sequence of tasks; the same command continues an interrupted run.",
        epilog="example: mcit-lightning quickstart strategy.rank=4 order=[flags,digits] out=runs/trial",
    )
    parser.add_argument("experiment", help="a YAML file, or the name of a shipped experiment")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="takes precedence over the file")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    options = parser.parse_args(arguments)
    _quiet()

    from mcit_lightning.loading import find_experiment, load_config  # after argparse: --help answers at once

    sys.path.insert(0, os.getcwd())  # for `imports`, as `python -m` does; the console script would not find them

    try:
        config = load_config(find_experiment(options.experiment), options.overrides)
        from mcit_lightning.runner import run

        _quiet_libraries()
        run(config)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 3)
    except KeyboardInterrupt:
        return _stopped("interrupted", 130)
    except SystemExit as error:  # how Lightning ends after Ctrl-C and after SIGTERM
        if isinstance(error.__context__, KeyboardInterrupt):
            return _stopped("interrupted", 130)
        if type(error).__name__ == "SIGTERMException":
            return _stopped("terminated", 143)
        raise
    except RuntimeError as error:
        if "LOCAL_RANK" in os.environ and any(
            word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")
        ):
            logging.getLogger(__name__).error("another process of this run stopped; see its message")
            return 1
        raise
    return 0


def _stopped(how: str, status: int) -> int:
    logging.getLogger(__name__).error("%s; the same command continues the run", how)
    return status


def _fail(error: ValueError | OSError, status: int) -> int:
    """Log our own errors in one line; let errors that no code of ours raised keep their traceback."""
    from mcit_lightning.rundir import disk_error

    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    origin = trace.tb_frame.f_globals.get("__name__", "") if trace is not None else ""
    text = str(error)
    if "DataLoader worker process" in text:  # torch packs the worker's traceback into the message
        ours = text.rpartition("\nValueError: ")
        origin, text = ("mcit_lightning", ours[2].strip()) if ours[1] else (origin, text)
    known = origin.partition(".")[0] in ("mcit_lightning", "callbacks")
    if isinstance(error, OSError):
        text, known = disk_error(error), known or error.errno in DISK_ERRORS
    if not known or os.environ.get("MCIT_DEBUG"):
        raise error
    logging.getLogger(__name__).error("%s", text)
    return status


def _quiet() -> None:
    """One line per event on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)


def _quiet_libraries() -> None:
    """Leave out what the many Trainers of a run would repeat. After the imports: Lightning sets its own levels when imported."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "httpx", "datasets", "PIL", "matplotlib"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*module.s. in eval mode at the start of training.*",  # a frozen vision tower is meant to be
        ".*smaller than the logging interval.*",
        ".*Total length of `list` across ranks is zero.*",  # a stage without validation data
        ".*isinstance.treespec, LeafSpec.*",  # from inside Lightning
    ):
        warnings.filterwarnings("ignore", message=message)


if __name__ == "__main__":
    sys.exit(main())
