"""How far a cell of a sweep is, from what is in its folder."""

import fcntl
import json
from dataclasses import asdict
from typing import Literal

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.loading import flatten, load_config
from mcit_lightning.rundir import MAY_CHANGE
from mcit_lightning.sweep.plan import Cell

Status = Literal["new", "begun", "finished", "busy"]


def status(cell: Cell) -> Status:
    """`busy`: another process is running it.

    Raises:
        ValueError: the cell is finished, but with other settings than the sweep now asks for.
    """
    if _locked(cell):
        return "busy"
    try:
        state = json.loads((cell.folder / "state.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "new"
    except ValueError:  # the run itself says what to do about a damaged file
        return "begun"
    if not (isinstance(state, dict) and state.get("finished")):
        return "begun"
    if changed := differences(load_config(cell.folder / "config.yaml"), cell.config()):
        raise ValueError(
            f"{cell.folder}: is finished, but with other settings than the sweep's now: {'; '.join(changed)}. "
            "Undo the change, give the run another name, choose another folder with out=DIR, or delete the old run"
        )
    return "finished"


def differences(old: ExperimentConfig, new: ExperimentConfig) -> list[str]:
    """What two configurations compute differently, as `key: old -> new`."""
    one, two = flatten(asdict(old)), flatten(asdict(new))
    return [
        f"{key}: {one.get(key)!r} -> {two.get(key)!r}"
        for key in sorted(one.keys() | two.keys())
        if one.get(key) != two.get(key) and not any(key == k or key.startswith(f"{k}.") for k in MAY_CHANGE)
    ]


def _locked(cell: Cell) -> bool:
    """Whether a process holds the run directory; a run locks it as long as it lives."""
    try:
        with (cell.folder / ".lock").open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    return False
