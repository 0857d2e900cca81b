"""Products that keep nothing for the backward pass but what they are given.

Branches are parameters of their own, but one product over all of them is faster than a product each. Autograd would keep the
joined copy until the backward pass, and a router's float32 copy of its input; here they are made again there, and of the input is
kept what the parts that train read, so that a layer with many branches keeps no more memory than one with a single branch.

Shapes: B batch, S tokens, E branches, r rank, n inputs and m outputs of the product.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def join(parts: Sequence[Tensor], dim: int, dtype: torch.dtype) -> Tensor:
    """The parts side by side, in the given type; a single part of that type is not copied."""
    return (parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)).to(dtype)


def mix(parts: Sequence[Tensor], gate: Tensor) -> Tensor:
    """[B, r, m], the transposed parts [m, r] summed with each sample's weights [B, E], in the type of the gate."""
    return (gate @ _rows(parts, gate.dtype)).unflatten(1, parts[0].T.shape)


def linear(x: Tensor, parts: Sequence[Tensor], dim: int, base: Tensor | None = None) -> Tensor:
    """base + x W^T, where W [m, n] is the parts joined along `dim`.

    Args:
        x: [..., n], of the type in which is computed.
        parts: of any floating type.
        dim: 0 or 1.
        base: [..., m], of the type of x; None is zero.
    """
    if len(parts) == 1 and parts[0].dtype == x.dtype:
        return _product(x, parts[0], base)
    product: Tensor = _Linear.apply(x, base, dim, *parts)
    return product


def batched_product(x: Tensor, weight: Tensor, base: Tensor | None = None) -> Tensor:
    """base + x W_b with a weight for each sample.

    Args:
        x: [B, S, r].
        weight: [B, r, m].
        base: [B, S, m]; None is zero.
    """
    return torch.bmm(x, weight) if base is None else torch.baddbmm(base, x, weight)


def mixed_linear(x: Tensor, parts: Sequence[Tensor], gate: Tensor, base: Tensor | None = None) -> Tensor:
    """base + x W_b, where W_b [r, m] is `mix` of the parts.

    Args:
        x: [B, S, r], of the type in which is computed.
        parts: E of [m, r].
        gate: [B, E], of the type of x.
        base: [B, S, m], of the type of x; None is zero.
    """
    product: Tensor = _MixedLinear.apply(x, gate, base, *parts)
    return product


def float_linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T in float32, for x [..., n] and W [m, n] of any type; call it outside of autocast."""
    if x.dtype == weight.dtype == torch.float32:
        return F.linear(x, weight)
    product: Tensor = _FloatLinear.apply(x, weight)
    return product


def _product(x: Tensor, weight: Tensor, base: Tensor | None) -> Tensor:
    if base is None:
        return F.linear(x, weight)
    return torch.addmm(base.flatten(0, -2), x.flatten(0, -2), weight.T).view(base.shape)


def _rows(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[E, r * m]: transposed, because products along a long last axis are several times faster on a CPU."""
    return torch.stack([part.T for part in parts]).flatten(1).to(dtype)


def _where(needed: Sequence[bool], pieces: Sequence[Tensor]) -> list[Tensor | None]:
    """The pieces that are needed; as copies if others are not, because a view would hold those in memory as a gradient."""
    return [
        (piece if all(needed) else piece.clone()) if wanted else None
        for wanted, piece in zip(needed, pieces, strict=True)
    ]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor | None, dim: int, *parts: Tensor) -> Tensor:
        needed = ctx.needs_input_grad[3:]
        sizes = [part.shape[1] for part in parts]
        if all(needed):
            kept = [x]
        elif dim == 0:
            kept = [x] if any(needed) else []
        else:  # each part reads columns of its own
            pieces = x.split(sizes, -1)
            kept = [piece.clone() for piece, wanted in zip(pieces, needed, strict=True) if wanted]
        ctx.save_for_backward(*parts, *kept)
        ctx.dim, ctx.sizes = dim, sizes
        return _product(x, join(parts, dim, x.dtype), base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_x, needs_base, _, *needs_part = ctx.needs_input_grad
        saved = ctx.saved_tensors  # once: activation checkpointing gives them out a single time
        parts, kept = saved[: len(needs_part)], saved[len(needs_part) :]
        of_x = grad @ join(parts, ctx.dim, grad.dtype) if needs_x else None
        of_parts: list[Tensor | None] = [None] * len(parts)
        if any(needs_part):
            x = kept[0]
            if ctx.dim == 1 and not all(needs_part):  # zeros elsewhere: a product of the same shape rounds alike
                rows, left = grad.shape[:-1], iter(kept)
                columns = zip(ctx.sizes, needs_part, strict=True)
                x = torch.cat([next(left) if wanted else grad.new_zeros(*rows, size) for size, wanted in columns], -1)
            whole = (grad.flatten(0, -2).T @ x.flatten(0, -2)).to(parts[0].dtype)
            of_parts = _where(needs_part, whole.split([part.shape[ctx.dim] for part in parts], ctx.dim))
        return of_x, grad if needs_base else None, None, *of_parts


class _MixedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, base: Tensor | None, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(x, gate, *parts)
        return batched_product(x, mix(parts, gate), base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, *parts = ctx.saved_tensors
        needs_x, needs_gate, needs_base, *needs_part = ctx.needs_input_grad
        of_x = grad @ mix(parts, gate).transpose(1, 2) if needs_x else None
        of_gate: Tensor | None = None
        of_parts: list[Tensor | None] = [None] * len(parts)
        if needs_gate or any(needs_part):
            of_mixed = (x.transpose(1, 2) @ grad).flatten(1)  # [B, r * m]
            if needs_gate:
                of_gate = of_mixed @ _rows(parts, gate.dtype).T
            if any(needs_part):
                whole = (gate.T @ of_mixed).to(parts[0].dtype).unflatten(1, parts[0].T.shape)
                of_parts = _where(needs_part, whole.transpose(1, 2).unbind())
        return of_x, of_gate, grad if needs_base else None, *of_parts


class _FloatLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        of_x = (grad @ weight.float()).to(x.dtype) if needs_x else None
        of_weight: Tensor | None = None
        if needs_weight:
            of_weight = (grad.flatten(0, -2).T @ x.flatten(0, -2).float()).to(weight.dtype)
        return of_x, of_weight
