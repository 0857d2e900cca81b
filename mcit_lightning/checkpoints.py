"""Checkpoint files: written atomically with a checksum at their end, and read without executing anything in them."""

import errno
import hashlib
import logging
import os
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from mcit_lightning.errors import first_line
from mcit_lightning.evaluation.files import replacing

logger = logging.getLogger(__name__)

MARK = b"\nmcit-sha256:"
FOOTER = len(MARK) + 64 + 1
"""Bytes after torch's own content: the mark, the digest of everything before it in hexadecimal, a newline. `torch.load` passes
over them."""
_CHUNK = 1 << 20
_BROKEN_DISK = (errno.EIO, errno.EBADMSG, errno.EUCLEAN)


class DamagedCheckpointError(ValueError):
    """The file is not what was written: cut short, or changed on the disk."""


class SealedCheckpointIO(CheckpointIO):
    """How the Trainer writes and reads checkpoints: `write_checkpoint` and `read_checkpoint`.

    Lightning's own writer goes through a file in the system's temporary folder, which may be small, and which a kill leaves
    there.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """See `write_checkpoint`."""
        write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | os.PathLike[str], map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """See `read_checkpoint`; always onto the CPU and with `weights_only`."""
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Delete the file, if it is there."""
        Path(path).unlink(missing_ok=True)


class _Hashed:
    """The part of a binary file's interface that `torch.save` uses; hashes what goes through."""

    def __init__(self, file: BinaryIO) -> None:
        self.digest = hashlib.sha256()
        self.error: OSError | None = None
        self._file = file

    def write(self, content: Any) -> int:
        self.digest.update(content)
        try:
            return self._file.write(content)
        except OSError as error:  # torch would turn it into a RuntimeError about its zip file
            self.error = error
            raise

    def flush(self) -> None:
        self._file.flush()


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """Write a checkpoint with its checksum; the file is there whole or not at all.

    Raises:
        OSError: the disk is full or not writable; an older file of that name is then untouched.
    """
    with replacing(path) as file:
        hashed = _Hashed(file)
        try:
            torch.save(content, hashed)  # type: ignore[arg-type]
        except Exception:
            if hashed.error is not None:
                raise hashed.error from None
            raise
        file.write(MARK + hashed.digest.hexdigest().encode() + b"\n")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint onto the CPU, without executing anything in it.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpointError: it does not match its checksum.
        ValueError: it does, but is not a checkpoint that this version can read; the message names it and the remedy.
        OSError: it may not be read.
    """
    with _opened(path) as file:
        check_seal(path, file)
        file.seek(0)
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises RuntimeError, UnpicklingError, EOFError, KeyError, ...
            first = first_line(error)
            raise ValueError(
                f"{path}: cannot be read as a checkpoint ({first}), though it is as it was written; nothing in it was executed. "
                "Another program or version wrote it: put the right file there, or delete it, the stage is then done again"
            ) from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("mcit"), dict):
        raise ValueError(
            f"{path}: is not a checkpoint of mcit_lightning; delete the file, the stage is then done again"
        )
    return checkpoint


def check_seal(path: Path, file: BinaryIO | None = None) -> None:
    """Compare a checkpoint's content with its checksum.

    Args:
        path: the file.
        file: the same, open for reading, where the caller goes on with it.

    Raises:
        FileNotFoundError: there is none.
        DamagedCheckpointError: it does not match, or cannot be read from the disk.
        OSError: it may not be read.
    """
    if file is None:
        with _opened(path) as opened:
            check_seal(path, opened)
        return
    try:
        size = file.seek(0, os.SEEK_END) - FOOTER
        file.seek(max(size, 0))
        footer = file.read()
        if size < 0 or not footer.startswith(MARK):
            raise DamagedCheckpointError(f"{path}: is damaged: it has no checksum at its end, so it was cut short")
        file.seek(0)
        digest = hashlib.sha256()
        while size > 0:
            content = file.read(min(size, _CHUNK))
            if not content:
                break
            digest.update(content)
            size -= len(content)
    except OSError as error:
        if error.errno in _BROKEN_DISK:
            raise DamagedCheckpointError(f"{path}: is damaged: {error.strerror}") from error
        raise
    if footer != MARK + digest.hexdigest().encode() + b"\n":
        raise DamagedCheckpointError(f"{path}: is damaged: its content does not match its checksum")


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a checkpoint; remove it, the stage is then done again")
    return path.open("rb")
