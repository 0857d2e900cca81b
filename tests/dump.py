"""A callback that writes down what each rank holds at the end of a stage, to compare ranks from outside."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor
from torch.distributed.tensor import DTensor


def digest(state: dict[str, Tensor]) -> str:
    """Of names and bytes; of a tensor that is spread over processes, this one's part."""
    found = hashlib.sha256()
    for key in sorted(state):
        value = state[key].to_local() if isinstance(state[key], DTensor) else state[key]
        found.update(key.encode() + value.cpu().numpy().tobytes())
    return found.hexdigest()


class DumpRank(L.Callback):
    """Writes `rank<r>_<stage>.json` into a folder: digests of the saved and of all other weights, structure log, evaluated rows.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state, saved = pl_module.state_dict(), pl_module.saved_keys()
        content = {
            "weights": digest({key: state[key] for key in saved}),
            "base": digest({key.replace(".base.", "."): state[key] for key in set(state) - saved}),
            "structure": pl_module.structure.to_list(),
        }
        self._write(trainer, f"{pl_module.stage.name}", content)

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        counts = {task: float(metric.count) for task, metric in pl_module.answer_metrics.items()}
        self._write(trainer, f"test_{Path(trainer.default_root_dir).name}", counts)

    def _write(self, trainer: L.Trainer, name: str, content: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank{trainer.global_rank}_{name}.json").write_text(json.dumps(content))
