"""Writing a file so that a reader, or a run killed half-way, only ever sees the old or the new content."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

CHECKSUM = "sha256"
"""Key under which `checked_json` keeps the checksum."""


def check_new_folder(out: Path) -> None:
    """Refuse a folder that a command's `--out` must not write into.

    Raises:
        ValueError: there is something already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} is not empty; give a new folder, or delete what is there")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace `path` with `content`. Raises as `replacing`."""
    with replacing(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file beside `path` that takes its place when the block ends: flushed to the disk, renamed, the folder flushed too.

    Raises:
        OSError: the disk is full or the folder not writable; the old file is then untouched and nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Bring renames in a folder to the disk, so that a power cut cannot undo them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that have no such thing
            raise
    finally:
        os.close(descriptor)


def checked_json(values: dict[str, Any]) -> str:
    """An object as indented JSON text, with a checksum over its other keys at the end."""
    return json.dumps({**values, CHECKSUM: _digest(values)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def read_checked_json(text: str) -> dict[str, Any]:
    """Inverse of `checked_json`; text without a checksum, from an older version, is taken as it is.

    Raises:
        ValueError: the text is no JSON object, or its content is not what the checksum was made of.
    """
    try:
        values = json.loads(text, parse_int=_whole)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(values, dict):
        raise ValueError("it holds no object")
    written = values.pop(CHECKSUM, None)
    if written is not None and written != _digest(values):
        raise ValueError(
            f"its content does not match its {CHECKSUM}; if you have changed it on purpose, remove that key"
        )
    return values


def _whole(digits: str) -> int | float:
    """A whole number; one that Python refuses to convert is infinite, so that whoever reads its field can name that."""
    return int(digits) if len(digits) < 400 else float(digits)


def _digest(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
