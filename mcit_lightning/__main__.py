"""The command line: exit status, and one line for what went wrong. The commands are in `mcit_lightning.commands`."""

import errno
import logging
import os
import sys

from mcit_lightning.commands import RUN, Command, find_command
from mcit_lightning.commands.quiet import one_line_an_event
from mcit_lightning.signals import StoppedBySignal

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Returns:
        Exit status: 0, 1 where a check found problems, 2 for bad input, 3 for a full or read-only disk, 130 after Ctrl-C, 143
        after SIGTERM, 138 after SIGUSR1.
    """
    one_line_an_event()
    sys.path.insert(0, os.getcwd())  # for `imports`, as `python -m` does; the console script would not find them
    command = RUN
    try:
        command, rest = find_command(sys.argv[1:] if arguments is None else arguments)
        options = command.parser().parse_intermixed_args(rest)
        return command.run(options)
    except ValueError as error:
        return _fail(error, 2)
    except OSError as error:
        return _fail(error, 3)
    except KeyboardInterrupt:
        return _stopped("interrupted", 130, command)
    except SystemExit as error:  # how Lightning ends after Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            return _stopped("interrupted", 130, command)
        if isinstance(error, StoppedBySignal):
            return _stopped(f"stopped by {error.name}", int(str(error.code)), command)
        raise
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not loaded for every command
            return _out_of_memory(error, command)
        if "LOCAL_RANK" in os.environ and any(
            word in str(error) for word in ("gloo", "NCCL", "Connection closed by peer")
        ):
            logging.getLogger(__name__).error("another process of this run stopped; see its message")
            return 1
        raise


def _out_of_memory(error: RuntimeError, command: Command) -> int:
    first = str(error).partition(". ")[0]  # torch goes on with numbers and advice of its own
    remedy = "lower what is loaded at a time"
    if command is RUN:
        remedy = (
            "in training lower data.batch_size (and raise trainer.accumulate_grad_batches by as much) or data.max_length, or set "
            "backbone.activation_checkpointing=true; in evaluation lower data.eval_batch_size. That is another configuration: "
            "name a new directory with out=DIR. If another program has the memory, run the same command again: the run continues"
        )
    logging.getLogger(__name__).error("%s; %s", first, remedy)
    return 1


def _stopped(how: str, status: int, command: Command) -> int:
    goes_on = "; the same command continues the run" if command is RUN else ""
    logging.getLogger(__name__).error("%s%s", how, goes_on)
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


if __name__ == "__main__":
    sys.exit(main())
