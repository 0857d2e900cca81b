"""Which tasks know a sample: one autoencoder per task, and its reconstruction error on the sample's features.

D-MoLE (Ge et al., ICML 2025, Eq. 8-12): an autoencoder is trained on the features of its task's samples; a sample whose error is
at most the task's threshold is taken for one of the task's. The autoencoders of all tasks are stacked, so that a batch is judged
by all of them with two batched matrix products.

Shapes: B samples, T tasks, d features, h hidden units.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Scaling = Literal["standardize", "l2", "none"]
"""What the autoencoder sees: features standardised over its task's samples, divided by their norm, or as they are."""


@dataclass(frozen=True)
class Recipe:
    """How an autoencoder is trained (Adam on the mean squared error)."""

    epochs: int
    lr: float
    lr_end: float
    """Learning rate at the end of a cosine; equal to `lr` for a constant rate."""
    batch_size: int
    patience: int | None
    """Stop after so many epochs without a lower training loss; None: never."""
    held_out: float
    """Share of the samples that sets the threshold instead of training; 0: those trained on set it."""
    quantile: float
    margin: float
    """The threshold is this multiple of the errors' quantile."""
    keep: Literal["best", "last"] = "best"
    """Weights of the epoch of lowest training loss, or of the last."""


class AutoencoderBank(nn.Module):
    """Autoencoders d -> h -> d (ReLU inside) of the tasks learnt so far, with their thresholds.

    Features may be NaN where a sample has none (the vision part without an image): they are left out of its error.

    Args:
        width: d.
        hidden: h; 0 makes every task a centroid instead: the reconstruction is the mean of its samples.
        output: activation of the reconstruction, `linear` or `sigmoid`.
        scaling: see `Scaling`.
    """

    tensors = ("mean", "deviation", "w1", "b1", "w2", "b2", "threshold")
    mean: Tensor
    deviation: Tensor
    w1: Tensor
    b1: Tensor
    w2: Tensor
    b2: Tensor
    threshold: Tensor

    def __init__(self, width: int, hidden: int, output: Literal["linear", "sigmoid"], scaling: Scaling) -> None:
        super().__init__()
        self.output, self.scaling = output, scaling
        self.tasks: list[str] = []
        shapes = {
            "mean": (width,),
            "deviation": (width,),
            "w1": (hidden, width),
            "b1": (hidden,),
            "w2": (width, hidden),
            "b2": (width,),
            "threshold": (),
        }
        for name, shape in shapes.items():  # float32 always: thresholds are compared with errors in float32
            self.register_buffer(name, torch.empty(0, *shape, dtype=torch.float32))

    def add_task(self, task: str, device: torch.device) -> None:
        """Make room for a task's autoencoder; one that is there is left as it is."""
        if task not in self.tasks:
            self.tasks.append(task)
            for name in self.tensors:
                old: Tensor = getattr(self, name)
                row = torch.zeros(1, *old.shape[1:], device=device, dtype=torch.float32)
                setattr(self, name, torch.cat([old.to(device), row]))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AutoencoderBank":
        """Follow the model to another device, but not to another type: a `bf16-true` run would round the thresholds."""
        for name in self.tensors:
            old: Tensor = getattr(self, name)
            moved = fn(old)
            setattr(self, name, moved if moved.dtype == old.dtype else old.to(moved.device))
        return self

    def errors(self, features: Tensor, tasks: slice = slice(None)) -> Tensor:
        """[B, T], mean squared reconstruction error of each sample under each task, in float32; features [B, d]."""
        with torch.autocast(features.device.type, enabled=False):
            present = ~features.isnan()
            targets, weights = self._scale(features.float(), present, tasks), present.float()
            network = (self.w1[tasks], self.b1[tasks], self.w2[tasks], self.b2[tasks])
            return (self._error(targets, weights, *network) / weights.sum(1)).T

    def fit(self, task: str, features: Tensor, recipe: Recipe, seed: int) -> dict[str, float]:
        """Train a task's autoencoder and set its threshold.

        The sample is split by a seeded permutation; the threshold comes from the part that was not trained on, because errors on
        the training part are too small.

        Args:
            features: [N, d], N at least 2; rows without any value are left out.

        Returns:
            `train_error` and `held_out_error` (means), `threshold`, and `epochs` done.

        Raises:
            ValueError: there are fewer than two samples.
        """
        features = features[~features.isnan().all(1)]
        if len(features) < 2:
            raise ValueError(
                f"the router of task {task!r} needs at least 2 training samples, there are {len(features)}"
            )
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(features), generator=generator).to(features.device)
        held = max(1, min(len(features) - 1, round(recipe.held_out * len(features)))) if recipe.held_out else 0
        index = self.tasks.index(task)
        with torch.autocast(features.device.type, enabled=False):
            rest, train = features[order[:held]].float(), features[order[held:]].float()
            self._set_scale(index, train)
            epochs = self._train(index, train, recipe, generator) if self.w1.shape[1] else 0
            train_error, held_error = (self.errors(part, slice(index, index + 1))[:, 0] for part in (train, rest))
            known = held_error if held else train_error
            self.threshold[index] = recipe.margin * known.quantile(recipe.quantile)
        report = {
            "train_error": train_error.mean(),
            "held_out_error": held_error.mean(),
            "threshold": self.threshold[index],
        }
        if not held:
            del report["held_out_error"]
        return {name: value.item() for name, value in report.items()} | {"epochs": float(epochs)}

    def _set_scale(self, index: int, train: Tensor) -> None:
        """Mean and deviation of the task's training features, per dimension, missing values left out."""
        present = ~train.isnan()
        count = present.sum(0).clamp(min=1)
        values = self._norm(train, present)
        mean = values.sum(0) / count
        variance = (((values - mean) * present) ** 2).sum(0) / count
        if self.scaling != "standardize":
            self.mean[index], self.deviation[index] = (mean if not self.w1.shape[1] else 0.0), 1.0
            return
        # dimensions that hardly vary would turn rounding into errors
        floor = 1e-3 * variance[count > 1].sqrt().mean() if bool((count > 1).any()) else variance.new_ones(())
        self.mean[index], self.deviation[index] = mean, variance.sqrt().clamp(min=floor.clamp(min=1e-6))

    def _norm(self, features: Tensor, present: Tensor) -> Tensor:
        """Missing values as zero, and unit length where `l2` asks for it."""
        values = features.masked_fill(~present, 0.0)
        return F.normalize(values, dim=-1) if self.scaling == "l2" else values

    def _scale(self, features: Tensor, present: Tensor, tasks: slice) -> Tensor:
        """[T, B, d], what each task's autoencoder is to reconstruct; zero where a value is missing."""
        mean, deviation = self.mean[tasks].unsqueeze(1), self.deviation[tasks].unsqueeze(1)
        return ((self._norm(features, present) - mean) / deviation) * present

    def _error(self, targets: Tensor, weights: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        """[T, B], squared error summed over the dimensions that a sample has; targets [T, B, d], weights [B, d]."""
        if not w1.shape[1]:  # a centroid: the mean is zero after scaling
            return (targets**2 * weights).sum(-1)
        hidden = torch.baddbmm(b1.unsqueeze(1), targets, w1.transpose(1, 2)).relu()
        output = torch.baddbmm(b2.unsqueeze(1), hidden, w2.transpose(1, 2))
        output = output.sigmoid() if self.output == "sigmoid" else output
        return ((output - targets) ** 2 * weights).sum(-1)

    def _mean_error(self, targets: Tensor, weights: Tensor, autoencoder: dict[str, Tensor]) -> Tensor:
        """[], mean over samples of the error of one autoencoder that is not in the bank; targets and weights [B, d]."""
        parts = (value.unsqueeze(0) for value in autoencoder.values())
        return (self._error(targets.unsqueeze(0), weights, *parts)[0] / weights.sum(1)).mean()

    def _train(self, index: int, train: Tensor, recipe: Recipe, generator: torch.Generator) -> int:
        """Adam from a seeded start (as `nn.Linear`); sets the weights and returns the epochs."""
        present = ~train.isnan()
        targets = self._scale(train, present, slice(index, index + 1))[0]
        weights = present.float()
        start = {}
        for name in ("w1", "b1", "w2", "b2"):
            shape = getattr(self, name).shape[1:]
            fan_in = self.w1.shape[2] if name in ("w1", "b1") else self.w1.shape[1]
            draw = (2 * torch.rand(shape, generator=generator) - 1) / math.sqrt(fan_in)
            start[name] = draw.to(train.device).requires_grad_()
        optimizer = torch.optim.Adam(start.values(), lr=recipe.lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs, eta_min=recipe.lr_end)
        best, kept, since, done = math.inf, {name: value.detach().clone() for name, value in start.items()}, 0, 0
        for _ in range(recipe.epochs):
            with torch.enable_grad():
                for chosen in torch.randperm(len(targets), generator=generator).split(recipe.batch_size):
                    rows = chosen.to(train.device)
                    error = self._mean_error(targets[rows], weights[rows], start)
                    optimizer.zero_grad()
                    error.backward()
                    optimizer.step()
            schedule.step()
            done += 1
            with torch.no_grad():  # of these weights; the mean over the epoch's steps would be that of older ones
                loss, since = float(self._mean_error(targets, weights, start)), since + 1
            if recipe.keep == "last":
                kept = start
            elif loss < best:
                kept = {name: value.detach().clone() for name, value in start.items()}
            if loss < best:
                best, since = loss, 0
            if recipe.patience is not None and since >= recipe.patience:
                break
        for name, value in kept.items():
            getattr(self, name)[index] = value.detach()
        return done
