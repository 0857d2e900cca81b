"""Start of a task: the strategy looks at some of its samples before it trains."""

import lightning as L

from callbacks.base import TaskCallback, share_state
from callbacks.showing import show_samples
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import Stage


class TaskPreview(TaskCallback):
    """Grows what the strategy plans, shows it samples of the task (`preview`), and calls its `begin_task`.

    Rank zero's strategy state is then given to all ranks. (Adapters become rank zero's when DDP wraps the model.) A task that
    was started before an interruption is left as it is.
    """

    def on_task_start(self, trainer: L.Trainer, module: MCITModule, stage: Stage) -> None:
        """Plan and grow unless another callback has, then look."""
        if module.is_restored(stage):
            return
        if module.structure.plan(stage.name) is None:
            module.grow(module.strategy.plan(stage, module.towers))
        samples = module.strategy.preview_samples(trainer.datamodule.train_rows)  # type: ignore[attr-defined]
        if samples:
            module.requires_grad_(False)
            show_samples(trainer, module, samples, lambda batch: module.strategy.preview(module.towers, batch, stage))
        module.strategy.begin_task(module.towers, stage)
        share_state(trainer, module)
