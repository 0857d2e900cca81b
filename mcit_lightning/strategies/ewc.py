"""Online EWC (Schwarz et al., ICML 2018; after Kirkpatrick et al., PNAS 2017): parameters that mattered are held in place."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.loss import Batch, LossOutput, answer_logits, answer_loss
from mcit_lightning.plans import FreezeRecord, TaskPlan
from mcit_lightning.snapshots import ParameterTable, sum_over_ranks, tuned_parameters
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.sequential import LoRAConfig, Sequential
from mcit_lightning.towers import Towers


@dataclass
class EWCConfig(LoRAConfig):
    """The penalty is weight / 2 * sum_j F_j (theta_j - theta*_j)^2."""

    weight: float = 1.0e6
    """lambda. With `normalize` it depends neither on the size of the model nor on the scale of its gradients. On the stream of
    docs/results.md 1e4 changed no answer, 1e6 kept more of earlier tasks and learnt less of new ones."""
    gamma: float = 0.95
    """What is left of the importance of earlier tasks when one is added; 1 forgets nothing."""
    samples: int = 256
    """Training samples of the task over which its importance is measured (all ranks together)."""
    labels: Literal["data", "model"] = "data"
    """Answers in the Fisher's log-likelihood: those of the data (empirical Fisher), or drawn from the model's own prediction."""
    normalize: bool = True
    """Divide a task's Fisher by its sum over all parameters, so that every task weighs alike."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight < 0:
            raise ValueError(f"weight: is {self.weight}, must not be negative")
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma: is {self.gamma}, must be in [0, 1]")
        if self.samples < 1:
            raise ValueError(f"samples: is {self.samples}, must be at least 1")


@STRATEGIES.register("ewc")
class OnlineEWC(Sequential):
    """One LoRA (and the projector, if it trains) through all tasks, with one quadratic penalty for all tasks so far.

        L = L_task + weight / 2 * sum_j F*_j (theta_j - theta*_j)^2
        F* <- gamma F* + F_task,    theta* <- theta               after each task (Schwarz et al.)
        F_task = 1/N sum_x (d log p(y | x) / d theta)^2           the diagonal of the Fisher information

    The gradient of each sample is squared for itself, summed over ranks. Left out: Progress & Compress's two networks, and
    Kirkpatrick's separate penalty per task.
    """

    Config = EWCConfig
    config: EWCConfig
    shards = False
    review_batch_size = 1  # the square of a batch's gradient is not the sum of its samples' squares

    def __init__(self, config: EWCConfig) -> None:
        super().__init__(config)
        self.importance = ParameterTable()
        self.anchor = ParameterTable()
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The LoRA, and room for importance and anchor of every tuned parameter."""
        super().grow(towers, plan)
        for name, parameter in tuned_parameters(towers, projector=self.tunes_projector).items():
            if name not in self.anchor:
                self.importance[name] = torch.zeros_like(parameter)
                self.anchor[name] = parameter

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Cross-entropy and, from the second stage on, the penalty."""
        output = answer_loss(model, batch)  # type: ignore[arg-type]
        if stage.index > 0:
            penalty = self.penalty(model)
            output.loss = output.loss + penalty
            output.parts["penalty"] = penalty
        return output

    def penalty(self, model: nn.Module) -> Tensor:
        """weight / 2 * sum_j F*_j (theta_j - theta*_j)^2, a scalar."""
        terms = [
            (weights * (model.get_parameter(name) - self.anchor[name]) ** 2).sum()
            for name, weights in self.importance.items()
        ]
        return self.config.weight / 2 * torch.stack(terms).sum()

    def review_samples(self, rows: int) -> int:
        """N."""
        return min(rows, self.config.samples)

    def review(self, towers: Towers, batch: Batch, stage: Stage) -> None:
        """Add the squared gradient of one sample's log-likelihood."""
        parameters = tuned_parameters(towers, projector=self.tunes_projector)
        logits = answer_logits(towers.model, batch).float()
        targets = batch["targets"] if self.config.labels == "data" else self._drawn(logits.detach(), batch, stage)
        loss = F.cross_entropy(logits, targets, reduction="sum")
        found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        for name, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                self._sums[name] = self._sums.get(name, 0.0) + gradient.float() ** 2
        self._count += 1

    def end_task(self, towers: Towers, stage: Stage) -> FreezeRecord | None:
        """F* <- gamma F* + F_task, and the anchor moves to where the task has ended."""
        parameters = tuned_parameters(towers, projector=self.tunes_projector)
        device = towers.model.device
        count = sum_over_ranks(torch.tensor(float(self._count), device=device))
        fisher = {
            name: sum_over_ranks(self._sums.get(name, torch.zeros_like(parameter, dtype=torch.float32))) / count
            for name, parameter in parameters.items()
        }
        total = torch.stack([value.sum() for value in fisher.values()]).sum()
        scale = total.clamp(min=torch.finfo(total.dtype).tiny) if self.config.normalize else torch.ones_like(total)
        for name, parameter in parameters.items():
            self.importance[name] = self.config.gamma * self.importance[name] + fisher[name] / scale
            self.anchor[name] = parameter
        self._sums, self._count = {}, 0
        return None

    def _drawn(self, logits: Tensor, batch: Batch, stage: Stage) -> Tensor:
        """[N], an answer token per position from the model's prediction [N, vocabulary]; the same on every machine and rank."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "fisher", stage.index, batch["index"][0]))
        return torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator).squeeze(1).to(logits.device)
