"""Tensors beside a model's tuned parameters: copies of their values, or their importance for earlier tasks."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mcit_lightning.towers import Towers


def tuned_parameters(towers: Towers, *, projector: bool) -> dict[str, nn.Parameter]:
    """Parameters that are tuned through all tasks, by their names in the model: all adapters, and the projector if it trains.

    Args:
        projector: whether the projector trains (`ContinualStrategy.tunes_projector`).
    """
    found = {
        f"{path}.{name}": parameter
        for path, layer in towers.adapters.items()
        for name, parameter in layer.adapter_parameters()
    }
    if projector:
        named = towers.model.named_parameters()
        found.update({name: parameter for name, parameter in named if towers.tower_of(name) == "projector"})
    return found


class ParameterTable(nn.Module):
    """A tensor for each of some parameters of a model, by the parameters' names.

    The tensors are buffers, so nothing trains them, they go where the strategy goes, and they are saved with it. Make the rows
    in `grow`: a checkpoint is loaded into the rows that replay has made, which take on the shapes of what is loaded.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[str] = []
        self.register_load_state_dict_pre_hook(_take_shapes)

    def __setitem__(self, name: str, value: Tensor) -> None:
        """Set a row to a copy of `value`; one that exists keeps its place among the others, and its data type."""
        value = value.detach()
        if name not in self.rows:
            self.rows.append(name)
            self.register_buffer(_key(name), value.clone())
        elif self[name].shape == value.shape:
            self[name].copy_(value)
        else:
            setattr(self, _key(name), value.to(self[name], copy=True))

    def __getitem__(self, name: str) -> Tensor:
        return self.get_buffer(_key(name))

    def __contains__(self, name: str) -> bool:
        return name in self.rows

    def __len__(self) -> int:
        return len(self.rows)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, in the order in which they were made."""
        for name in self.rows:
            yield name, self[name]

    @contextmanager
    def in_place(self, model: nn.Module) -> Iterator[None]:
        """Context without gradients in which the model's parameters have the table's values."""
        live = {name: model.get_parameter(name) for name in self.rows}
        kept = {name: parameter.data for name, parameter in live.items()}
        kind = next(iter(kept.values())).device.type if kept else "cpu"
        # autocast keeps the casts that it has made of a parameter, and would go on with them after the values have changed
        autocast = torch.autocast(
            kind,
            enabled=torch.is_autocast_enabled(kind),
            dtype=torch.get_autocast_dtype(kind),
            cache_enabled=False,
        )
        try:
            for name, parameter in live.items():
                parameter.data = self[name]
            with torch.no_grad(), autocast:
                yield
        finally:
            for name, parameter in live.items():
                parameter.data = kept[name]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """The tensor, summed in place over all processes; collective where there are several."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(tensor)
    return tensor


def _take_shapes(table: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: Any) -> None:
    """Before a state is loaded: rows of another shape make room for it."""
    assert isinstance(table, ParameterTable)
    for name in table.rows:
        saved = state.get(prefix + _key(name))
        if saved is not None and saved.shape != table[name].shape:
            setattr(table, _key(name), table[name].new_empty(saved.shape))


def _key(name: str) -> str:
    return name.replace(".", "/")  # a buffer's name may not hold a dot
