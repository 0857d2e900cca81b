"""Which training samples are too long for `data.max_length`."""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

UNSEEN, WHOLE, SHORTENED, DROPPED = range(4)

logger = logging.getLogger(__name__)


class CutLog:
    """What became of each training row of a stage.

    It holds one byte per row of a task's file, so a row counts once, no matter how often epochs, a joint stage, two
    processes or a resumed run meet it. What other processes saw is known after `merge`.

    Args:
        rows: task -> rows of its training file.
        max_length: `data.max_length`, for messages.
        largest: element-wise maximum of a tensor over all processes.
    """

    def __init__(self, rows: Mapping[str, int], *, max_length: int, largest: Callable[[Tensor], Tensor]) -> None:
        self._max_length = max_length
        self._largest = largest
        self._fate = {task: torch.full((count,), UNSEEN, dtype=torch.uint8) for task, count in rows.items()}
        # Shortest (negated) and longest dropped sample: both are maxima.
        self._range = {task: torch.tensor([torch.iinfo(torch.int64).min, 0]) for task in rows}
        self._warned: set[tuple[str, int]] = set()

    def observe(self, batch: Mapping[str, Any]) -> None:
        """Note the rows of a training batch; warns at a task's first shortened and first dropped sample.

        Replayed rows of other tasks were counted when these were learnt.
        """
        fates = {None: WHOLE, "shortened": SHORTENED, "dropped": DROPPED}
        for task, row, length, cut in zip(batch["task"], batch["index"], batch["length"], batch["cut"], strict=True):
            if task not in self._fate:
                continue
            fate = fates[cut]
            self._fate[task][row] = fate
            if fate == DROPPED:
                self._range[task] = torch.maximum(self._range[task], torch.tensor([-length, length]))
            if fate != WHOLE and (task, fate) not in self._warned:
                self._warned.add((task, fate))
                self._warn(task, length, fate)

    def merge(self) -> None:
        """Learn what the other processes saw. Collective: every process calls it at the same point."""
        for table in (self._fate, self._range):
            for task, values in table.items():
                table[task] = self._largest(values).cpu()

    def end_epoch(self) -> None:
        """Merge, and refuse to go on with a task that trains on nothing. Collective.

        Raises:
            ValueError: every sample of a task that any process saw was dropped.
        """
        self.merge()
        for task, fate in self._fate.items():
            seen = int((fate != UNSEEN).sum())
            if seen > 0 and seen == int((fate == DROPPED).sum()):
                shortest, longest = -int(self._range[task][0]), int(self._range[task][1])
                raise ValueError(
                    f"Task {task!r} trains on nothing: none of its {seen} training samples seen in this stage has an "
                    f"answer token within data.max_length={self._max_length}. The shortest has {shortest} tokens, the "
                    f"longest {longest}, image tokens included. Raise data.max_length, to {longest} to keep all whole."
                )

    def counts(self, task: str) -> dict[str, int]:
        """Rows of the task that were `shortened` and `dropped`; none for a task that the stage does not train."""
        fate = self._fate.get(task, torch.zeros(0))
        return {"shortened": int((fate == SHORTENED).sum()), "dropped": int((fate == DROPPED).sum())}

    def state_dict(self) -> dict[str, Any]:
        """What all processes have seen. Collective, as saving a checkpoint is: only one process's state is stored."""
        self.merge()
        return {task: {"fate": fate.clone(), "range": self._range[task].clone()} for task, fate in self._fate.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: a task's file had another number of rows.
        """
        for task, saved in state.items():
            rows = len(self._fate.get(task, ()))
            if len(saved["fate"]) != rows:
                raise ValueError(
                    f"tasks.{task}.train: the checkpoint was saved with {len(saved['fate'])} rows, now there are {rows}. "
                    "Restore the file, or start the run over with overwrite=true."
                )
            self._fate[task] = torch.maximum(self._fate[task], saved["fate"])
            self._range[task] = torch.maximum(self._range[task], saved["range"])

    def _warn(self, task: str, length: int, fate: int) -> None:
        what = (
            "the end of its text is cut off"
            if fate == SHORTENED
            else "no answer token is left, so the sample does not train (it is dropped)"
        )
        logger.warning(
            "Task %s has a training sample of %d tokens, above data.max_length=%d: %s. The report counts such samples.",
            task,
            length,
            self._max_length,
            what,
        )
