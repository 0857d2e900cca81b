"""FSDP2: the frozen decoder is spread over the processes, and everything that trains is on all of them.

A parameter-efficient method trains a few per cent of a model. So only the weights that never change are sharded
(`torch.distributed.fsdp.fully_shard`, layer by layer), and adapters, routers, keys and the projector stay ordinary parameters
whose gradients are averaged, as under DDP. Strategies and callbacks therefore see the same tensors on every engine, modules grow
and freeze in the same way, and a checkpoint of one engine loads on any other.

Every process must run the decoder the same number of times, because its weights are gathered from all of them. `lockstep` and
`Towers.any_process` see to that where the data would have it otherwise.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from mcit_lightning.towers import Towers

T = TypeVar("T")

TOO_FEW = (
    "trainer.strategy: under fsdp2 each of the {processes} processes needs at least one sample to evaluate or probe; use more "
    "rows, or fewer trainer.devices"
)
BUCKET = 2**25
"""Elements of the gradients that are averaged in one collective."""


def shard_decoder(towers: Towers, mesh: DeviceMesh) -> None:
    """Spread the weights of the decoder's layers over the processes of a mesh; does nothing the second time.

    Embeddings, output head, projector and vision tower stay whole: they are small beside the layers, and a process whose batch
    has no image does not run the tower. Adapters stay whole too, those that are there and those to come.

    Raises:
        ValueError: the decoder has no list of layers.
    """
    if towers.sharded:
        return
    decoder, layers = towers.model.get_submodule(towers.language), decoder_layers(towers)
    if not layers:
        raise ValueError(f"trainer.strategy: fsdp2 finds no list of layers in {type(decoder).__name__}; use ddp")
    whole = {parameter for layer in towers.adapters.values() for _, parameter in layer.adapter_parameters()}
    for layer in layers:
        own = [parameter for parameter in layer.parameters() if parameter not in whole]
        dtype = max(own, key=Tensor.numel).dtype
        others = {parameter for parameter in own if parameter.dtype != dtype}  # norms that some models keep in float32
        fully_shard(
            layer,
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32),  # of probed gradients
            ignored_params=whole | others,
        )
    # holds no weight itself: it is the root that orders the layers' communication
    fully_shard(decoder, mesh=mesh, ignored_params={p for p in decoder.parameters() if not isinstance(p, DTensor)})
    towers.sharded = True


def decoder_layers(towers: Towers) -> list[nn.Module]:
    """The decoder's layers, in order; none if it keeps them in no list."""
    decoder = towers.model.get_submodule(towers.language)
    return [layer for child in decoder.children() if isinstance(child, nn.ModuleList) for layer in child]


def lockstep(items: Iterable[T], towers: Towers) -> Iterator[tuple[T, bool]]:
    """A process's share of the items, each with True, and under FSDP2 its last one with False until no process has any left.

    What is done with an item that comes with False must not count.

    Raises:
        ValueError: under FSDP2, a process has no item at all (on every process).
    """
    iterator, last = iter(items), None
    while True:
        item = next(iterator, None)
        if not towers.any_process(item is not None):
            return
        last = last if item is None else item
        if towers.any_process(last is None):
            raise ValueError(TOO_FEW.format(processes=dist.get_world_size()))
        assert last is not None
        yield last, item is not None


def most_rounds(own: int, towers: Towers) -> int:
    """The largest number of batches that any process has; its own where that does not matter. Collective under FSDP2.

    Raises:
        ValueError: a process has none, so that it has nothing to repeat (on every process).
    """
    if not towers.sharded:
        return own
    most = torch.tensor([own, -own], device=towers.model.device)
    dist.all_reduce(most, dist.ReduceOp.MAX)
    longest, shortest = int(most[0]), -int(most[1])
    if longest and not shortest:
        raise ValueError(TOO_FEW.format(processes=dist.get_world_size()))
    return longest


class FSDP2Strategy(ModelParallelStrategy):
    """Lightning's FSDP2 strategy for a module whose `configure_model` shards only weights that never train.

    Checkpoints are those of DDP: one file with whole tensors, and the optimizer's state by position.

    Args:
        processes: over how many the weights are spread.
        find_unused: a parameter may get no gradient on some process; those that get none on any are left alone.
    """

    def __init__(self, processes: int, *, find_unused: bool) -> None:
        super().__init__(data_parallel_size=processes, tensor_parallel_size=1, save_distributed_checkpoint=False)
        self.find_unused = find_unused

    def setup(self, trainer: L.Trainer) -> None:
        """As DDP does when it wraps a model: what trains starts from rank zero's values."""
        super().setup(trainer)
        assert self.lightning_module is not None
        for parameter in self.lightning_module.parameters():
            if parameter.requires_grad:
                dist.broadcast(parameter.data, 0)

    def optimizer_step(
        self,
        optimizer: Optimizer,
        closure: Callable[[], Any],
        model: L.LightningModule | nn.Module | None = None,
        **kwargs: Any,
    ) -> Any:
        """Average the gradients between the backward pass and everything that reads them."""

        def averaged() -> Any:
            result = closure()
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            average_gradients(parameters, find_unused=self.find_unused)
            return result

        return super().optimizer_step(optimizer, averaged, model, **kwargs)

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """As under DDP: the structure is replayed before the optimizer is made."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """As under DDP."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What is whole on this process; nothing is gathered for a checkpoint, which keeps no frozen weight."""
        state = Strategy.lightning_module_state_dict(self)
        return {name: value for name, value in state.items() if not isinstance(value, DTensor)}

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """As under DDP."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As under DDP."""
        return Strategy.optimizer_state(self, optimizer)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """As under DDP."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any = None) -> None:
        """As under DDP."""
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        """As under DDP."""
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)


def average_gradients(parameters: Sequence[nn.Parameter], *, find_unused: bool) -> None:
    """Replace every gradient by its mean over all processes. Collective.

    Args:
        find_unused: ask the other processes which parameters have a gradient anywhere (a rank's own missing one counts as zero);
            one without any stays without, so that the optimizer leaves it alone. False promises that all have one.
    """
    if dist.get_world_size() == 1:
        return
    if find_unused:
        used = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        parameters = [parameter for parameter, flag in zip(parameters, used.tolist(), strict=True) if flag]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets(parameters):
        gradients = [parameter.grad for parameter in bucket]
        flat = torch.cat([gradient.flatten() for gradient in gradients if gradient is not None])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(gradients, flat.split([p.numel() for p in bucket]), strict=True):
            assert gradient is not None
            gradient.copy_(part.view_as(gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters of one type, about `BUCKET` elements each time."""
    for dtype in dict.fromkeys(parameter.dtype for parameter in parameters):
        bucket: list[nn.Parameter] = []
        size = 0
        for parameter in parameters:
            if parameter.dtype == dtype:
                bucket.append(parameter)
                size += parameter.numel()
                if size >= BUCKET:
                    yield bucket
                    bucket, size = [], 0
        if bucket:
            yield bucket
