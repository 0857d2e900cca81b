"""The one adapter layer: a gated mixture of low-rank branches around a frozen linear.

    y = W0 x + scale * sum_e g_e(x) B_e A_e x

Every method of this framework is this formula. Experts that own their A, branches that share a trunk A, and plain LoRA (one
branch, no gate) differ only in which A a branch reads, which parameters train and where the gate comes from. The sum is two
matrix products over the joined branches (`joined`), never a loop over them.

Shapes: B batch, S tokens, E branches (gates, to be exact), r rank, d_in and d_out the linear's features.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mcit_lightning.joined import batched_product, join, linear, mix, mixed_linear

Gate = Tensor | Callable[[Tensor], Tensor] | None
"""Weights of the branches: [E] for all inputs, [B, E] per sample, [B, S, E] per token, a function of the layer's input that
returns one of these, or None for weight one everywhere."""

Fusion = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""Weighs what a gate has weighed once more, by what the branches answer: from the gated hidden values [..., sum of ranks] and the
branches' B to hidden values of the same shape."""


class AdapterLinear(nn.Module):
    """A linear layer with low-rank branches beside it; the base is frozen.

    Each branch's B, and each trunk's A, is a parameter of its own, because `requires_grad` is per parameter and branches freeze
    one by one. Branches that always train together may be one parameter with several gates, which costs less. Branches are
    kept in the order in which they were added; gates index them by that order.

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
        self.gates_of: dict[str, int] = {}
        self.gate: Gate = None
        self.fusion: Fusion | None = None
        self.enabled = True
        self._used: tuple[str, ...] | None = None
        self._owners: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}
        self._unmerged: list[nn.Parameter] = []  # the pretrained weight while merged, hidden from `parameters()`
        self._kept: dict[str, Tensor] | None = (
            None  # what `keep` puts together once; plain tensors, not in `state_dict()`
        )
        empty = torch.empty(0, dtype=torch.long, device=base.weight.device)
        self.register_buffer("branch_index", empty, persistent=False)  # [sum of ranks]: gate of the column
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

    @property
    def num_gates(self) -> int:
        """E, the number of weights that a gate has to give."""
        return sum(self.gates_of.values())

    def add_branch(
        self,
        name: str,
        rank: int,
        *,
        seed: int,
        path: str,
        trunk: str | None = None,
        std: float | None = None,
        gates: int = 1,
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
            gates: the branch is that many branches of rank / gates, side by side in one A and one B.

        Raises:
            ValueError: the branch or the trunk exists with another rank.
        """
        assert rank % gates == 0, (rank, gates)
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
            self.trunk_of[name], self.gates_of[name] = trunk, gates
        self._index()

    @torch.no_grad()
    def reset_branch(self, name: str, *, seed: int, path: str) -> None:
        """Give a branch with an A of its own the values with which `add_branch` started it; arguments as there."""
        a, b = self.lora_a[name], self.lora_b[name]
        a.copy_(_draw(a.shape[0], self.in_features, (seed, name, path), a.device))
        b.zero_()

    def add_router(self, name: str, *, seed: int, path: str, shape: tuple[int, int] | None = None) -> None:
        """Add a router without bias; one that exists is left as it is.

        Routers are read by gates and fusions, not by this layer. Initial values are drawn like a new A's.

        Args:
            name: the router's key in `routers`.
            seed: the run's seed.
            path: the module's path in the backbone.
            shape: (what it chooses among, width of what it reads); None is [E, d_in], for the branches that there are.

        Raises:
            ValueError: the router exists for another number of branches.
        """
        branches, width = shape or (self.num_gates, self.in_features)
        if name not in self.routers:
            values = _draw(branches, width, (seed, f"router {name}", path), self.base.weight.device)
            self.routers[name] = nn.Parameter(values)
        elif self.routers[name].shape[0] != branches:
            raise ValueError(
                f"{path}: router {name!r} is for {self.routers[name].shape[0]} branches, there are {branches}"
            )

    def use(self, names: Sequence[str] | None) -> None:
        """Let only some branches take part, so that a forward costs what these cost, however many there are.

        Decided on the host, once per batch. The gate must then have a column for each of them, in their order, and no other.

        Args:
            names: of branches with an A of their own; None for all.

        Raises:
            ValueError: there is no such branch, or trunks are shared.
        """
        if names is not None and (unknown := set(names) - set(self.lora_b)):
            raise ValueError(f"unknown branch {', '.join(sorted(unknown))}; there are {', '.join(self.lora_b)}")
        if names is not None and not self._own_trunks:
            raise ValueError("branches that share a trunk take part together")
        self._used = None if names is None else tuple(names)
        if self._kept is not None:
            self._kept.clear()

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
        a = join(list(self.lora_a.values()), 0, torch.float32).index_select(0, self.trunk_columns)
        b = join(list(self.lora_b.values()), 1, torch.float32)
        if gate is not None:
            b = b * gate.to(b.dtype).index_select(0, self.branch_index)
        self._unmerged.append(self.base.weight)  # type: ignore[arg-type]
        merged = self.base.weight.float() + self.scale * (b @ a)
        self.base.weight = nn.Parameter(merged.to(self.base.weight.dtype), requires_grad=False)

    def unmerge(self) -> None:
        """Put the pretrained weight back; nothing to do if the layer is not merged."""
        if self._unmerged:
            self.base.weight = self._unmerged.pop()

    @contextmanager
    def keep(self) -> Iterator[None]:
        """Context in which no branch changes: without gradients, joined weights are made once and not for every token."""
        self._kept = {}
        try:
            yield
        finally:
            self._kept = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if not self.lora_b or self._unmerged or not self.enabled or self._used == ():
            return y
        names = list(self.lora_b) if self._used is None else self._used
        b = [self.lora_b[name] for name in names]
        a = list(self.lora_a.values()) if self._used is None else [self.lora_a[self.trunk_of[name]] for name in names]
        gate = self.gate(x) if callable(self.gate) else self.gate  # routers see what dropout leaves out
        device = x.device.type
        x = x.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a[0].dtype)
        hidden = linear(self.dropout(x), self._parts("a", a, 0, x.dtype), 0)
        into = y if y.dtype == hidden.dtype else None
        if self._mixes_first(hidden, gate):
            assert isinstance(gate, Tensor)
            out = self._mixed(hidden, b, gate, into)
        else:
            gated = self._gated(hidden, gate)
            out = linear(
                gated if self.fusion is None else self.fusion(gated, b), self._parts("b", b, 1, x.dtype), 1, into
            )
        return y + out.to(y.dtype) if into is None else out

    def _gated(self, hidden: Tensor, gate: Tensor | None) -> Tensor:
        """[..., sum of ranks], what the branches' B read: the trunks' outputs, gated and scaled."""
        if gate is None:
            hidden = self.scale * hidden
            return hidden if self._own_trunks else hidden.index_select(-1, self.trunk_columns)
        gate = (self.scale * gate).to(hidden.dtype)
        if gate.dim() == 2 and hidden.dim() == 3:
            gate = gate.unsqueeze(1)
        if self._equal_ranks and (self._own_trunks or len(self.lora_a) == 1):
            columns = gate.shape[-1] if self._own_trunks else 1
            return (hidden.unflatten(-1, (columns, -1)) * gate.unsqueeze(-1)).flatten(-2)
        if self._used is not None:
            return hidden * gate.index_select(-1, self._owners_of(self._used))
        return hidden.index_select(-1, self.trunk_columns) * gate.index_select(-1, self.branch_index)

    def _owners_of(self, names: tuple[str, ...]) -> Tensor:
        """[sum of ranks], as `branch_index` for some of the branches."""
        key = (names, self.branch_index.device)
        if key not in self._owners:
            self._owners[key] = torch.tensor(_owners(self._ranks(names)), device=key[1])
        return self._owners[key]

    def _mixes_first(self, hidden: Tensor, gate: Tensor | None) -> bool:
        """Whether a sample's branches are summed before the product: they share a trunk and a gate, over enough tokens."""
        if len(self.lora_a) != 1 or len(self.lora_b) == 1 or gate is None or self.fusion is not None:
            return False
        if gate.dim() != 2 or hidden.dim() != 3:
            return False
        return hidden.shape[1] >= len(self.lora_b) or (self._keeps() and len(hidden) <= len(self.lora_b))

    def _mixed(self, hidden: Tensor, b: list[nn.Parameter], gate: Tensor, into: Tensor | None) -> Tensor:
        """[B, S, d_out], `into` and the sum of the branches."""
        if not self._keeps() or len(hidden) > len(b):
            return mixed_linear(hidden, b, (self.scale * gate).to(hidden.dtype), into)
        assert self._kept is not None
        if self._kept.get("gate") is not gate:  # a generation decides it once
            self._kept["gate"] = gate
            self._kept["mixed"] = mix(b, (self.scale * gate).to(hidden.dtype))
        return batched_product(hidden, self._kept["mixed"], into)

    def _keeps(self) -> bool:
        return self._kept is not None and not torch.is_grad_enabled()

    def _parts(self, name: str, parts: list[nn.Parameter], dim: int, dtype: torch.dtype) -> list[Tensor]:
        """The parts, or in `keep` the one tensor that they make."""
        if not self._keeps():
            return [*parts]
        assert self._kept is not None
        if name not in self._kept:
            self._kept[name] = join(parts, dim, dtype)
        return [self._kept[name]]

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
        starts, start = {}, 0
        for trunk, parameter in self.lora_a.items():
            starts[trunk] = start
            start += parameter.shape[0]
        columns = [starts[self.trunk_of[name]] + i for name, b in self.lora_b.items() for i in range(b.shape[1])]
        ranks = self._ranks(self.lora_b)
        self._used, self._owners = None, {}
        self._equal_ranks = len(set(ranks)) == 1
        self._own_trunks = columns == list(range(start))  # the columns of A_cat are those of B_cat
        self.trunk_columns = torch.tensor(columns, dtype=torch.long, device=device)
        self.branch_index = torch.tensor(_owners(ranks), dtype=torch.long, device=device)

    def _ranks(self, names: Iterable[str]) -> list[int]:
        """Rank of every gate of the branches, in their order."""
        return [self.lora_b[name].shape[1] // self.gates_of[name] for name in names for _ in range(self.gates_of[name])]


def _owners(ranks: list[int]) -> list[int]:
    """For each column of the joined branches, the number of the gate that weighs it."""
    return [gate for gate, rank in enumerate(ranks) for _ in range(rank)]


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
