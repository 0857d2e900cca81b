"""A callback that notes what a run trains and what its losses are, and keeps the module for later."""

from dataclasses import dataclass, field
from typing import Any

import lightning as L
from torch import Tensor


@dataclass
class Seen:
    """What one run did, by stage name."""

    trained: dict[str, set[str]] = field(default_factory=dict)
    """Names of the parameters that required a gradient."""
    before: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Their values when training began."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    module: Any = None


SEEN = Seen()
"""Of the current run; `new` starts over."""


def new() -> Seen:
    """Watch the next run."""
    global SEEN
    SEEN = Seen()
    return SEEN


class Watch(L.Callback):
    """Fills `SEEN`."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        trained = {name: value for name, value in pl_module.named_parameters() if value.requires_grad}
        stage = pl_module.stage.name
        SEEN.trained[stage] = set(trained)
        SEEN.before[stage] = {name: value.detach().clone() for name, value in trained.items()}
        SEEN.module = pl_module

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        SEEN.losses.setdefault(pl_module.stage.name, []).append(float(outputs["loss"]))
