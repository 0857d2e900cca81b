"""SIGTERM and SIGUSR1: a run stops at the next point from which it can continue.

Clusters send SIGTERM before they take a machine away, and SLURM any signal some time before a job's limit
(`#SBATCH --signal=USR1@120`).
"""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StoppedBySignal(SystemExit):
    """The run has stopped as asked; its exit status is 128 plus the signal's number, as a shell gives it."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.name = signal.Signals(signum).name


class StopRequest:
    """Whether this process was asked to stop.

    While `deferring`, a signal is noted; otherwise it ends the process's work at once.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.deferring = False
        self.forward: Callable[[int], Any] | None = None
        """Passes a signal on to the processes that this one has started."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen inside the block. Only the main thread can; in any other nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.getsignal(signum) for signum in STOP_SIGNALS}
        self.__init__()  # type: ignore[misc]
        self.listen()
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, signal.SIG_DFL if handler is None else handler)
            self.forward = None

    def listen(self) -> None:
        """Handle the signals here, and nowhere else."""
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                signal.signal(signum, self._handle)

    def check(self) -> None:
        """Stop if a signal has come.

        Raises:
            StoppedBySignal: it has.
        """
        if self.signum is not None:
            raise StoppedBySignal(self.signum)

    def _handle(self, signum: int, frame: Any) -> None:
        if (
            self.signum is None
        ):  # a second one, for example of a launcher whose other process has stopped, changes nothing
            self.signum = signum
            if self.forward is not None:
                self.forward(signum)
        if not self.deferring:
            self.check()


STOP = StopRequest()
"""Signals belong to the process, so there is one."""


def _forget_in_child() -> None:
    """Loader workers end with their parent; a signal to the whole process group must not end them before it has saved.

    Torch gives them another handler of SIGTERM after this, which `data.sampler.init_worker` takes away again.
    """
    if STOP.signum is None and signal.getsignal(signal.SIGUSR1) == STOP._handle:
        STOP.forward = None
        for signum in STOP_SIGNALS:
            signal.signal(signum, signal.SIG_IGN)


os.register_at_fork(after_in_child=_forget_in_child)
