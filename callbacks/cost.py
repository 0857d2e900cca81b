"""What a stage's training cost."""

import resource
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

import lightning as L
import torch

from mcit_lightning.evaluation.results import Results
from mcit_lightning.stages import Stage


class StageCost(L.Callback):
    """Measures a stage's training (seconds, samples per second, parameters, peak memory) for the results' cost row.

    Logs `train/tokens_per_second` of this process, real tokens over the last `log_every_n_steps` batches. Nothing here waits for
    the device.

    Seconds are the wall-clock time of the training loop without validation. They are part of the checkpoint, so a
    resumed stage reports the time of the work that it is made of, not of work that was lost. The row is saved at the
    end of the training, so that it is still there if the run is killed during the evaluation.

    The module must have `results` and `saved_keys`, the data module `stage`, `check_trained` and `report`, the batches `id` and
    `num_tokens`.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._samples = 0
        self._since: float | None = None
        self._trainable = 0
        self._window: deque[tuple[float, int]] = deque()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock and the memory's high-water mark."""
        self._trainable = sum(parameter.numel() for parameter in pl_module.parameters() if parameter.requires_grad)
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(trainer.strategy.root_device)
        self._since = time.perf_counter()
        self._window = deque([(self._since, 0)], maxlen=max(1, trainer.log_every_n_steps) + 1)  # type: ignore[attr-defined]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the samples of all ranks and the tokens of this one."""
        self._samples += len(batch["id"]) * trainer.world_size
        self._window.append((time.perf_counter(), batch["num_tokens"]))
        (begin, _), *rest = self._window
        rate = sum(tokens for _, tokens in rest) / (rest[-1][0] - begin)
        pl_module.log("train/tokens_per_second", rate, batch_size=len(batch["id"]))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stop the clock while the stage validates."""
        self._seconds, self._since = self._elapsed(), None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on with the clock."""
        self._since = time.perf_counter()
        self._window.clear()
        self._window.append((self._since, 0))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Fill the stage's cost row and save the results.

        Raises:
            ValueError: the stage has trained on nothing, because every sample was too long.
        """
        seconds = self._elapsed()
        results: Results = pl_module.results  # type: ignore[assignment]
        stream: Any = trainer.datamodule  # type: ignore[attr-defined]
        stream.check_trained()
        stage: Stage = stream.stage
        cost = results.cost_row(stage.name, stage.folder, stage.row)
        cost.trainable_params = self._trainable
        cost.stored_params = _stored(pl_module)
        cost.train_seconds, cost.train_samples_per_second = seconds, self._samples / seconds
        cost.peak_memory_bytes = _peak_memory(trainer)
        report = stream.report()
        results.notes.setdefault("data", {}).update({task: report[task] for task in stage.train})
        if trainer.is_global_zero:
            results.save(Path(trainer.default_root_dir).parent)

    def state_dict(self) -> dict[str, Any]:
        """Seconds and samples so far."""
        return {"seconds": self._elapsed(), "samples": self._samples}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the checkpoint's counts."""
        self._seconds, self._samples = state_dict["seconds"], state_dict["samples"]

    def _elapsed(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)


def _stored(pl_module: L.LightningModule) -> int:
    """Parameters that a checkpoint of the module keeps."""
    keys: set[str] = pl_module.saved_keys()  # type: ignore[operator]
    return sum(value.numel() for name, value in pl_module.state_dict().items() if name in keys)


def _peak_memory(trainer: L.Trainer) -> int:
    """Bytes of accelerator memory at their highest in this training, or the resident memory of a CPU process."""
    device = trainer.strategy.root_device
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:  # the kernel counts in KiB, on macOS in bytes
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    dtype = torch.int64
    largest = trainer.strategy.reduce(torch.tensor(peak, dtype=dtype, device=device), reduce_op="max")
    return int(largest)
