"""Write a folder once, and notice when what is there is not what was written.

The manifest is removed before anything is replaced and written after everything else, so a folder with a manifest
is a complete one whatever killed the process before it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "manifest.json"
FORMAT_VERSION = 1

log = logging.getLogger(__name__)


def build_once(root: Path, fingerprint: Mapping[str, Any], build: Callable[[Path], None]) -> bool:
    """Fill `root` by `build(folder)` unless it already holds exactly that; return whether it was built.

    Args:
        root: The folder to fill. What else lies in it is left alone.
        fingerprint: What the content depends on (options, package versions); another fingerprint means a rebuild.
        build: Writes the files below an empty folder. It has to be deterministic given the fingerprint.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        problem = find_problem(root, fingerprint)
        if problem is None:
            return False
        log.info("writing %s (%s)", root, problem)
        # Inside root, so that the renames below stay on one file system.
        staging = Path(tempfile.mkdtemp(prefix=".building-", dir=root))
        try:
            build(staging)
            _write_manifest(staging, fingerprint)
            _swap_in(staging, root)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return True


def find_problem(root: Path, fingerprint: Mapping[str, Any]) -> str | None:
    """Say why `root` has to be (re)built, or None if every file is as it was written."""
    try:
        manifest = json.loads((root / MANIFEST).read_text(encoding="utf-8"))
        format_version, written_for, files = manifest["format"], manifest["fingerprint"], dict(manifest["files"])
    except FileNotFoundError:
        return "nothing there yet"
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return f"{MANIFEST} is unreadable"
    if format_version != FORMAT_VERSION:
        return f"format {format_version} instead of {FORMAT_VERSION}"
    if written_for != json.loads(json.dumps(fingerprint)):
        return "made with other options or package versions"
    for name, digest in files.items():
        path = root / name
        if not path.is_file():
            return f"{name} is missing"
        if _sha256(path) != digest:
            return f"{name} has changed"
    return None


def _write_manifest(folder: Path, fingerprint: Mapping[str, Any]) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): _sha256(path) for path in paths}
    content = {"format": FORMAT_VERSION, "fingerprint": fingerprint, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), encoding="utf-8")


def _swap_in(staging: Path, root: Path) -> None:
    (root / MANIFEST).unlink(missing_ok=True)
    entries = sorted(entry for entry in staging.iterdir() if entry.name != MANIFEST)
    for entry in [*entries, staging / MANIFEST]:  # the manifest last: it vouches for the rest
        target = root / entry.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(entry, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
