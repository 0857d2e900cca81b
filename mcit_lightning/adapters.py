"""The one adapter layer: a gated mixture of low-rank branches around a frozen linear.

    y = W0 x + scale * sum_e g_e(x) B_e A_e x

Every method of this framework is this formula. Experts that own their A, branches that share a trunk A, and plain LoRA (one
branch, no gate) differ only in which A a branch reads, which parameters train and where the gate comes from. The sum is two
matrix products over the concatenated branches, never a loop over them.

Shapes: B batch, S tokens, E branches, r rank, d_in and d_out the linear's features.
"""

import math
import zlib
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Gate = Tensor | Callable[[Tensor], Tensor] | None
"""Weights of the branches: [E] for all inputs, [B, E] per sample, [B, S, E] per token, a function of the layer's input that
returns one of these, or None for weight one everywhere."""


class AdapterLinear(nn.Module):
    """A linear layer with low-rank branches beside it; the base is frozen.

    Each branch's B, and each trunk's A, is a parameter of its own, because `requires_grad` is per parameter and branches freeze
    one by one. Branches are kept in the order in which they were added; gates index them by that order.

    Args:
        base: the linear to adapt; kept as the submodule `base`.
        scale: factor on the sum of the branches (alpha / r).
        dropout: probability of zeroing an input element of the branches, in training.
    """

    branch_index: Tensor
    trunk_columns: Tensor

    def __init__(self, base: nn.Linear, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.ParameterDict()
        self.lora_b = nn.ParameterDict()
        self.routers = nn.ParameterDict()
        self.trunk_of: dict[str, str] = {}
        self.gate: Gate = None
        self.enabled = True
        self._unmerged: list[nn.Parameter] = []  # the pretrained weight while merged, hidden from `parameters()`
        empty = torch.empty(0, dtype=torch.long, device=base.weight.device)
        self.register_buffer("branch_index", empty, persistent=False)  # [sum of ranks]: branch that owns the column
        self.register_buffer("trunk_columns", empty, persistent=False)  # [sum of ranks]: column of A_cat that feeds it

    # transformers reads these from linears that it does not call itself
    @property
    def weight(self) -> Tensor:
        """The base linear's weight, [d_out, d_in]."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The base linear's bias, [d_out], or None."""
        return self.base.bias

    @property
    def in_features(self) -> int:
        """d_in."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """d_out."""
        return self.base.out_features

    def add_branch(
        self, name: str, rank: int, *, seed: int, path: str, trunk: str | None = None, std: float | None = None
    ) -> None:
        """Add a branch; a second call with the same name and rank does nothing, so that plans can be replayed.

        A is drawn from a generator seeded by (seed, trunk name, module path) and B is zero, so the layer's output does not
        change, and every rank and every resumed process draws the same numbers.

        Args:
            name: the branch's key in `lora_b`.
            rank: r.
            seed: the run's seed.
            path: the module's path in the backbone.
            trunk: key in `lora_a` of the A that it reads; None gives it one of its own. A trunk that exists is shared.
            std: A is normal with this deviation; None is LoRA's usual Kaiming uniform.

        Raises:
            ValueError: the branch or the trunk exists with another rank.
        """
        trunk = trunk or name
        shapes = (("branch", self.lora_b, name, 1), ("trunk", self.lora_a, trunk, 0))
        for kind, table, key, axis in shapes:
            if key in table and table[key].shape[axis] != rank:
                raise ValueError(f"{path}: {kind} {key!r} has rank {table[key].shape[axis]}, asked for {rank}")
        device = self.base.weight.device
        if trunk not in self.lora_a:
            self.lora_a[trunk] = nn.Parameter(_draw(rank, self.in_features, (seed, trunk, path), device, std))
        if name not in self.lora_b:
            self.lora_b[name] = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
            self.trunk_of[name] = trunk
        self._index()

    def add_router(self, name: str, *, seed: int, path: str) -> None:
        """Add a router, [E, d_in] without bias, for the branches that there are; one that exists is left as it is.

        Routers are read by gates, not by this layer. Initial values are drawn like a new A's.

        Raises:
            ValueError: the router exists for another number of branches.
        """
        branches = len(self.lora_b)
        if name not in self.routers:
            values = _draw(branches, self.in_features, (seed, f"router {name}", path), self.base.weight.device)
            self.routers[name] = nn.Parameter(values)
        elif self.routers[name].shape[0] != branches:
            raise ValueError(
                f"{path}: router {name!r} is for {self.routers[name].shape[0]} branches, there are {branches}"
            )

    @torch.no_grad()
    def merge(self, gate: Tensor | None = None) -> None:
        """Add the branches to the base weight, so that the layer costs what the base costs.

        Only for a gate that does not depend on the input. The pretrained weight is kept, so `unmerge` is exact.

        Args:
            gate: [E], or None for weight one everywhere.

        Raises:
            ValueError: the layer is merged already, or its base is quantised or spread over processes.
        """
        if self._unmerged:
            raise ValueError("the layer is merged already; unmerge it first")
        if not self.base.weight.is_floating_point():
            raise ValueError("a quantised base cannot be merged with its branches")
        if isinstance(self.base.weight, DTensor):
            raise ValueError("a base that is spread over processes (fsdp2) cannot be merged with its branches")
        a = _concatenate(list(self.lora_a.values()), 0).index_select(0, self.trunk_columns)
        b = _concatenate(list(self.lora_b.values()), 1)
        if gate is not None:
            b = b * gate.to(b.dtype).index_select(0, self.branch_index)
        self._unmerged.append(self.base.weight)  # type: ignore[arg-type]
        merged = self.base.weight.float() + self.scale * (b @ a)
        self.base.weight = nn.Parameter(merged.to(self.base.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the pretrained weight back; nothing to do if the layer is not merged."""
        if self._unmerged:
            self.base.weight = self._unmerged.pop()

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.lora_b or self._unmerged or not self.enabled:
            return y
        a = _concatenate(list(self.lora_a.values()), 0)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(a.dtype)
        gate = self.gate(x) if callable(self.gate) else self.gate  # routers see what dropout leaves out
        hidden = F.linear(self.dropout(x), a)
        if self._mixes_first(hidden, gate):
            assert isinstance(gate, Tensor)
            branches = torch.stack(list(self.lora_b.values()))  # [E, d_out, r]
            mixed = torch.einsum("be,eor->bor", gate.to(hidden.dtype), branches.to(hidden.dtype))
            return y + (self.scale * torch.bmm(hidden, mixed.transpose(1, 2))).to(y.dtype)
        b = _concatenate(list(self.lora_b.values()), 1)
        if len(self.lora_a) != len(self.lora_b):
            hidden = hidden.index_select(-1, self.trunk_columns)  # every branch gets its trunk's columns
        if gate is not None:
            gate = gate.to(hidden.dtype)
            if gate.dim() == 2 and hidden.dim() == 3:
                gate = gate.unsqueeze(1)
            hidden = hidden * gate.index_select(-1, self.branch_index)
        return y + (self.scale * F.linear(hidden, b)).to(y.dtype)

    def _mixes_first(self, hidden: Tensor, gate: Tensor | None) -> bool:
        """Whether a sample's branches are summed before the product: they share a trunk and a gate, over enough tokens."""
        if len(self.lora_a) != 1 or len(self.lora_b) == 1 or gate is None:
            return False
        return gate.dim() == 2 and hidden.dim() == 3 and hidden.shape[1] >= len(self.lora_b)

    def adapter_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Names (relative to this module) and parameters of trunks, branches and routers."""
        for prefix, table in (("lora_a", self.lora_a), ("lora_b", self.lora_b), ("routers", self.routers)):
            for name, parameter in table.items():
                yield f"{prefix}.{name}", parameter

    def extra_repr(self) -> str:
        """Branches and trunks, for printing."""
        return f"branches={list(self.lora_b)}, trunks={list(self.lora_a)}, scale={self.scale}"

    def _index(self) -> None:
        device = self.base.weight.device
        ranks = [parameter.shape[1] for parameter in self.lora_b.values()]
        starts, start = {}, 0
        for trunk, parameter in self.lora_a.items():
            starts[trunk] = start
            start += parameter.shape[0]
        columns = [
            starts[self.trunk_of[name]] + i for name, rank in zip(self.lora_b, ranks, strict=True) for i in range(rank)
        ]
        owner = [index for index, rank in enumerate(ranks) for _ in range(rank)]
        self.trunk_columns = torch.tensor(columns, dtype=torch.long, device=device)
        self.branch_index = torch.tensor(owner, dtype=torch.long, device=device)


def _concatenate(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _draw(
    rank: int, features: int, key: tuple[int, str, str], device: torch.device, std: float | None = None
) -> Tensor:
    """[rank, features], float32: normal, or Kaiming uniform with a = sqrt(5) as in LoRA (Hu et al. 2022)."""
    if device.type == "meta":
        return torch.empty(rank, features, device=device)
    generator = torch.Generator().manual_seed(zlib.crc32("/".join(map(str, key)).encode()))
    weight = torch.empty(rank, features)
    if std is None:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    else:
        nn.init.normal_(weight, std=std, generator=generator)
    return weight.to(device)
