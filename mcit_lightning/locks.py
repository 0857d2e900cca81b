"""One run per directory."""

import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import IO
from weakref import WeakSet

logger = logging.getLogger(__name__)

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


class DirectoryLock:
    """Held by the process that runs in a directory, and by none of its children; the kernel lets go of it when that process ends.

    Args:
        folder: the directory, in which `.lock` is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock. Warns where the file system has none.

        Raises:
            ValueError: another process has it.
            OSError: the directory cannot be written.
        """
        file = (self._folder / ".lock").open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise ValueError(
                f"{self._folder}: another process is running this experiment; wait for it or use out=DIR"
            ) from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning(
                "%s: the file system has no locks (%s); make sure that no other process runs in this directory",
                self._folder,
                error.strerror,
            )
        self._file = file
        _HELD.add(self)

    def release(self) -> None:
        """Let go of the directory, if it is held."""
        if self._file is not None:
            self._file.close()
            self._file = None


_HELD: WeakSet[DirectoryLock] = WeakSet()


def _release_in_child() -> None:
    """A loader worker that outlives its killed parent for seconds must not keep the directory locked."""
    for lock in _HELD:
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
