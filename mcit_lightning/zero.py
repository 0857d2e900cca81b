"""DeepSpeed ZeRO-2: optimizer states and accumulated gradients of what trains are spread over the processes.

Every parameter is whole on every process, as under DDP. DeepSpeed's engine gets the trained parameters alone, not the model: it
is made for a `fit` and destroyed after it, so that the next stage has one of its own over other parameters, in the same process.
Frozen weights, probes before training and evaluation know nothing of it.

ZeRO fills its buckets in the order in which the backward pass yields gradients, and takes for granted that all processes have the
same order. Here they have not: a batch without images reaches the projector on one process and not on another, and a layer may
sum its branches in another way where answers are longer. Buckets of different content would be averaged without an error. So the
gradients are taken whole first, and given to the engine by a loss whose graph is the same everywhere.
"""

import logging
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torch.optim import Optimizer

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.sharding import BUCKET

ZERO2 = "deepspeed_stage_2"
"""Value of `trainer.strategy`; Lightning's name for it."""
PRECISIONS = ("auto", "32-true", "bf16-mixed")
"""Others need DeepSpeed's own scaling, or would keep the optimizer's state in bfloat16."""


def check_zero2(config: ExperimentConfig) -> None:
    """Refuse what does not go together with ZeRO-2.

    Raises:
        ValueError: DeepSpeed is not installed, or a key has a value that it cannot carry out; names both and the remedy.
    """
    trainer = config.trainer
    if trainer.get("gradient_clip_algorithm", "norm") != "norm":
        raise ValueError(f"trainer.gradient_clip_algorithm: {ZERO2} clips by norm only; leave the key out, or use ddp")
    if str(trainer.get("precision", "auto")) not in PRECISIONS:
        raise ValueError(
            f"trainer.precision: {trainer['precision']!r} is refused under {ZERO2}; use one of {', '.join(PRECISIONS)}"
        )
    if config.backbone.compile is not None:
        raise ValueError(
            f"backbone.compile: was never tried with trainer.strategy {ZERO2} and is refused; leave one out"
        )
    if not config.dry_run and find_spec("deepspeed") is None:
        raise ValueError(
            f"trainer.strategy: {ZERO2!r} needs DeepSpeed, which is not installed; pip install deepspeed, or the extra "
            "'deepspeed'. ddp computes the same"
        )


class ZeRO2Strategy(DDPStrategy):
    """DDP with DeepSpeed's ZeRO-2 engine in place of the wrapper around the model.

    Lightning's own `DeepSpeedStrategy` gives the whole module to an engine in every fit and every test, and writes folders that
    only the same ZeRO stage reads. Here checkpoints are those of DDP: one file, with the optimizer's state by parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self._engine: Any = None
        # of each of the optimizer's groups, in which ZeRO puts its shard in their place
        self._members: list[list[nn.Parameter]] = []

    def configure_ddp(self) -> None:
        """Nothing wraps the model."""

    def setup(self, trainer: L.Trainer) -> None:
        """Before training, give the trained parameters to an engine; they start from rank zero's values.

        Raises:
            ValueError: DeepSpeed computes on another kind of device than the Trainer.
        """
        super().setup(trainer)
        if trainer.state.fn != TrainerFn.FITTING:
            return
        import deepspeed  # takes seconds

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        theirs = deepspeed.get_accelerator().device_name()
        if theirs != self.root_device.type:
            raise ValueError(
                f"trainer.accelerator: the run computes on {self.root_device.type}, but DeepSpeed on {theirs}. Set the "
                f"environment variable DS_ACCELERATOR={self.root_device.type}"
            )
        (optimizer,) = self.optimizers
        self._members = [list(group["params"]) for group in optimizer.param_groups]
        self._engine, *_ = deepspeed.initialize(
            model=nn.ParameterList(self._trained()),
            optimizer=optimizer,
            config={
                "train_micro_batch_size_per_gpu": 1,  # for its own statistics only
                "gradient_accumulation_steps": 1,
                "managed_gradient_accumulation": False,  # Lightning says when a step is due
                "gradient_clipping": trainer.gradient_clip_val or 0.0,
                "zero_optimization": {
                    "stage": 2,
                    "overlap_comm": False,
                    # both are allocated whole
                    "reduce_bucket_size": BUCKET,
                    "allgather_bucket_size": BUCKET,
                },
            },
            dist_init_required=False,
        )

    def backward(self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any) -> Tensor:
        """Gradients of this process, and their mean over all processes in the engine's shards."""
        module = self.lightning_module
        assert module is not None and self._engine is not None
        loss = self.precision_plugin.pre_backward(closure_loss, module)
        trained = self._trained()
        gradients = _without_gaps(trained, torch.autograd.grad(loss, trained, allow_unused=True))
        # the derivative of a product by a parameter is the gradient that was just found
        products = [torch.dot(p.flatten(), g.flatten()) for p, g in zip(trained, gradients, strict=True)]
        self._engine.backward(torch.stack(products).sum())
        return self.precision_plugin.post_backward(loss, module)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """The engine clips, steps on its shard and gathers the parameters."""
        return super().optimizer_step(_EngineStep(self._engine, optimizer), closure, model, **kwargs)  # type: ignore[arg-type]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """AdamW's state by parameter, as under DDP, gathered from the shards. Collective."""
        states: list[dict[str, Tensor]] = []
        groups = []
        for group, members in zip(optimizer.param_groups, self._members, strict=True):
            (shard,) = group["params"]
            own: list[dict[str, Tensor]] = [{} for _ in members]
            for key, value in optimizer.state[shard].items():
                parts = self._gathered(value, members) if value.shape == shard.shape else [value.clone() for _ in own]
                for state, part in zip(own, parts, strict=True):
                    state[key] = part
            groups.append({**group, "params": list(range(len(states), len(states) + len(members)))})
            states += own
        return {"state": dict(enumerate(states)), "param_groups": groups}

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """This process's shards of a state by parameter.

        ZeRO counts steps by group. Where members differ, because some had no gradient in a step under another engine, the group
        has the largest count.
        """
        (optimizer,), (saved,) = self.optimizers, checkpoint["optimizer_states"]
        for group, values, members in zip(optimizer.param_groups, saved["param_groups"], self._members, strict=True):
            (shard,) = group["params"]
            states = [saved["state"].get(number, {}) for number in values["params"]]
            group.update({key: value for key, value in values.items() if key != "params"})
            for key in dict.fromkeys(key for state in states for key in state):
                found = [state.get(key) for state in states]
                if key == "step":
                    optimizer.state[shard][key] = torch.stack([value for value in found if value is not None]).max()
                else:
                    optimizer.state[shard][key] = self._own_shard(_without_gaps(members, found), shard.numel()).to(
                        shard
                    )

    def teardown(self) -> None:
        """Destroy the engine, and give every parameter memory of its own again."""
        if self._engine is not None:
            self._engine.destroy()
            for parameter in self._trained():
                parameter.data = parameter.data.clone()
            self._engine, self._members = None, []
        super().teardown()

    def _trained(self) -> list[nn.Parameter]:
        return [parameter for members in self._members for parameter in members]

    def _gathered(self, shard: Tensor, members: list[nn.Parameter]) -> list[Tensor]:
        """The shards of all processes, one after the other, are a group's parameters in their order, and padding."""
        shards = [torch.empty_like(shard) for _ in range(self.world_size)]
        dist.all_gather(shards, shard)
        sizes = [parameter.numel() for parameter in members]
        parts = torch.cat(shards)[: sum(sizes)].split(sizes)
        return [part.view_as(parameter).clone() for part, parameter in zip(parts, members, strict=True)]

    def _own_shard(self, values: list[Tensor], size: int) -> Tensor:
        """The reverse for this process: `size` elements."""
        flat = torch.cat([value.cpu().flatten() for value in values])
        padded = nn.functional.pad(flat, (0, size * self.world_size - flat.numel()))
        return padded[self.global_rank * size : (self.global_rank + 1) * size]


class _EngineStep:
    """The part of an optimizer's interface that Lightning's precision plugins use in a step."""

    def __init__(self, engine: Any, optimizer: Optimizer) -> None:
        self.param_groups = optimizer.param_groups
        self._engine = engine

    def step(self, closure: Callable[[], Any]) -> Any:
        result = closure()
        self._engine.step()
        return result


def _without_gaps(parameters: list[nn.Parameter], values: Iterable[Tensor | None]) -> list[Tensor]:
    """Zeros where a parameter has no value."""
    pairs = zip(parameters, values, strict=True)
    return [torch.zeros_like(parameter) if value is None else value for parameter, value in pairs]
