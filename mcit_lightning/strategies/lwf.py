"""Learning without Forgetting (Li and Hoiem, ECCV 2016, TPAMI 2018): the model before the task teaches the one that learns it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.loss import Batch, LossOutput, answer_logits
from mcit_lightning.plans import TaskPlan
from mcit_lightning.snapshots import ParameterTable, tuned_parameters
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.sequential import LoRAConfig, Sequential
from mcit_lightning.towers import Towers


@dataclass
class LwFConfig(LoRAConfig):
    """The paper's values."""

    weight: float = 1.0
    """lambda_o, of the distillation."""
    temperature: float = 2.0
    """T: both models' logits are divided by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ValueError(f"weight: is {self.weight}, must not be negative")
        if self.temperature <= 0:
            raise ValueError(f"temperature: is {self.temperature}, must be greater than 0")


@STRATEGIES.register("lwf")
class LwF(Sequential):
    """One LoRA (and the projector, if it trains); on the new task's inputs it is to predict what it did before the task.

        L = L_task + weight * KL(softmax(z_old / T) || softmax(z / T))        (Eq. 1-3)

    z_old are the logits of a frozen copy of the tuned parameters, on the answer tokens of the batch, after the true prefix. The
    divergence differs from the paper's cross-entropy by a constant. Left out: a head of its own per task, and the warm-up of the
    new head alone; a language model has one head for all tasks.
    """

    Config = LwFConfig
    config: LwFConfig

    def __init__(self, config: LwFConfig) -> None:
        super().__init__(config)
        self.teacher = ParameterTable()

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """The LoRA in the first stage; in every later one a copy of what has been learnt so far."""
        return TaskPlan(stage.name, ranks=super().plan(stage, towers).ranks, extra={"teacher": stage.index > 0})

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Attach the LoRA, or copy the tuned parameters as they are."""
        super().grow(towers, plan)
        if plan.extra["teacher"]:
            for name, parameter in tuned_parameters(towers, projector=self.tunes_projector).items():
                self.teacher[name] = parameter

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Cross-entropy and, from the second stage on, the distillation."""
        # the teacher first: activation checkpointing runs the last forward again in the backward pass
        old = self.teacher_logits(model, batch) if len(self.teacher) else None
        logits = answer_logits(model, batch).float()  # type: ignore[arg-type]
        count = max(batch["targets"].numel(), 1)
        output = LossOutput(F.cross_entropy(logits, batch["targets"], reduction="sum") / count)
        if old is not None:
            temperature = self.config.temperature
            student, teacher = (logits / temperature).log_softmax(-1), (old / temperature).log_softmax(-1)
            distillation = F.kl_div(student, teacher, reduction="sum", log_target=True) / count
            output.loss = output.loss + self.config.weight * distillation
            output.parts["distillation"] = distillation
        return output

    def teacher_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[N, vocabulary], float32, what the model predicted for the answer tokens before the task; without dropout."""
        with self.teacher.in_place(model), _without_dropout(model):
            return answer_logits(model, batch).float()  # type: ignore[arg-type]


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    layers = [module.dropout for module in model.modules() if isinstance(module, AdapterLinear)]
    active = [layer for layer in layers if layer.training]
    for layer in active:
        layer.eval()
    try:
        yield
    finally:
        for layer in active:
            layer.train()
