"""A callback that writes down what each rank holds at the end of a stage, to compare ranks from outside."""

import hashlib
import json
from pathlib import Path
from typing import Any

import lightning as L


class DumpRank(L.Callback):
    """Writes `rank<r>_<stage>.json` into a folder: digest of every saved weight, structure log, evaluated rows.

    Args:
        folder: where to.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        state = pl_module.state_dict()
        digest = hashlib.sha256()
        for key in sorted(pl_module.saved_keys()):
            digest.update(key.encode() + state[key].cpu().numpy().tobytes())
        self._write(
            trainer,
            f"{pl_module.stage.name}",
            {"weights": digest.hexdigest(), "structure": pl_module.structure.to_list()},
        )

    def on_test_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        counts = {task: float(metric.count) for task, metric in pl_module.answer_metrics.items()}
        self._write(trainer, f"test_{Path(trainer.default_root_dir).name}", counts)

    def _write(self, trainer: L.Trainer, name: str, content: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"rank{trainer.global_rank}_{name}.json").write_text(json.dumps(content))
