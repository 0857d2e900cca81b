"""Products over joined parts: the gradients are autograd's own, and nothing is kept but what they are given."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.joined import float_linear, linear, mix, mixed_linear


def tensors(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("based", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
def test_linear_over_parts(dim: int, based: bool) -> None:
    shapes = [(2, 6), (3, 6)] if dim == 0 else [(5, 2), (5, 4)]
    x, base, *parts = tensors((4, 3, 6), (4, 3, 5), *shapes)

    def product(x: Tensor, base: Tensor, *parts: Tensor) -> Tensor:
        return linear(x, parts, dim, base if based else None)

    expected = F.linear(x, torch.cat(parts, dim)) + (base if based else 0)
    torch.testing.assert_close(product(x, base, *parts), expected)
    assert torch.autograd.gradcheck(product, (x, base, *parts))


@pytest.mark.parametrize("based", [False, True])
def test_a_weight_for_each_sample(based: bool) -> None:
    x, gate, base, *parts = tensors((4, 3, 2), (4, 3), (4, 3, 5), *[(5, 2)] * 3)

    def product(x: Tensor, gate: Tensor, base: Tensor, *parts: Tensor) -> Tensor:
        return mixed_linear(x, parts, gate, base if based else None)

    mixed = torch.einsum("be,eor->bro", gate, torch.stack(parts))
    torch.testing.assert_close(mix(parts, gate), mixed)
    torch.testing.assert_close(product(x, gate, base, *parts), x @ mixed + (base if based else 0))
    assert torch.autograd.gradcheck(product, (x, gate, base, *parts))


@pytest.mark.parametrize("frozen", [(), (1,), (0, 1, 2)])
def test_frozen_parts_get_no_gradient(frozen: tuple[int, ...]) -> None:
    x, gate, base, *parts = tensors((4, 3, 2), (4, 3), (4, 3, 5), *[(5, 2)] * 3)
    for index in frozen:
        parts[index].requires_grad_(False)
    mixed_linear(x, parts, gate, base).square().sum().backward()
    (F.linear(x, parts[0]).sum(-1, keepdim=True) + linear(x.repeat(1, 1, 3), parts, 1)).square().sum().backward()
    for index, part in enumerate(parts):
        assert (part.grad is None) == (index in frozen)
    assert x.grad is not None and gate.grad is not None and base.grad is not None


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("trains", [(), (1,), (0, 2), (0, 1, 2)])
def test_frozen_parts_change_no_gradient_and_keep_no_memory(dim: int, trains: tuple[int, ...]) -> None:
    shapes = [(4, 32)] * 3 if dim == 0 else [(32, 4)] * 3
    width = 32 if dim == 0 else 12

    def run(frozen: set[int]) -> tuple[int, Tensor, list[Tensor | None]]:
        x, *parts = (tensor.detach().float().requires_grad_() for tensor in tensors((8, 16, width), *shapes))
        for index in frozen:
            parts[index].requires_grad_(False)
        own = {tensor.untyped_storage().data_ptr() for tensor in parts}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = linear(x, parts, dim)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        assert x.grad is not None
        return sum(kept.values()), x.grad, [part.grad for part in parts]

    _, of_x, of_parts = run(set())
    kept, own_x, own_parts = run({0, 1, 2} - set(trains))
    assert torch.equal(own_x, of_x)  # bitwise: what is frozen does not change how the others train
    for index, (own, other) in enumerate(zip(own_parts, of_parts, strict=True)):
        assert (own is None) == (index not in trains)
        if own is not None and other is not None:
            assert torch.equal(own, other) and (len(trains) == 3 or own.untyped_storage().nbytes() == own.nbytes)
    columns = width if dim == 0 and trains else 4 * len(trains)
    assert kept == 8 * 16 * columns * 4


@pytest.mark.parametrize("dim", [0, 1])
def test_frozen_parts_under_activation_checkpointing(dim: int) -> None:
    """Which gives a backward pass what was saved a single time."""
    x, *parts = tensors((4, 3, 6), *([(2, 6), (3, 6)] if dim == 0 else [(5, 2), (5, 4)]))
    parts[0].requires_grad_(False)

    def gradients(checkpointed: bool) -> tuple[Tensor, ...]:
        if checkpointed:
            answer = checkpoint(lambda value: linear(value, parts, dim), x, use_reentrant=False)
        else:
            answer = linear(x, parts, dim)
        return torch.autograd.grad(answer.square().sum(), [x, parts[1]])

    assert all(map(torch.equal, gradients(True), gradients(False)))


def test_router_logits_are_float32_products_of_a_bfloat16_input() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64).to(torch.bfloat16).requires_grad_()
    weight = nn.Parameter(torch.randn(8, 64))
    logits = float_linear(x, weight)
    assert logits.dtype == torch.float32 and torch.equal(logits, F.linear(x.float(), weight))
    logits.square().sum().backward()
    got = x.grad, weight.grad
    x.grad = weight.grad = None
    F.linear(x.float(), weight).square().sum().backward()
    assert got[0] is not None and got[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], x.grad)
    torch.testing.assert_close(got[1], weight.grad)


def saved(run: Callable[[], Tensor], layer: nn.Module) -> int:
    """Bytes that autograd keeps, parameters left out."""
    own = {parameter.untyped_storage().data_ptr() for parameter in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [False, True])
def test_eight_branches_keep_no_more_than_one(shared: bool, dtype: torch.dtype) -> None:
    """But for the gate and the gated columns: never a copy of the weights, nor a float32 one of the input."""

    def layer(branches: int) -> AdapterLinear:
        made = AdapterLinear(nn.Linear(64, 96, dtype=dtype), scale=2.0)
        for index in range(branches):
            made.add_branch(
                f"b{index}", 16 // branches, seed=0, path="m", trunk="trunk" if shared and branches > 1 else None
            )
        return made

    x = torch.randn(2, 16, 64, dtype=dtype, requires_grad=True)
    one, eight = layer(1), layer(8)
    eight.gate = torch.rand(2, 8, requires_grad=True)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        few, many = saved(lambda: one(x), one), saved(lambda: eight(x), eight)
    columns = 2 * 16 * 16 * x.element_size()
    assert many <= few + (0 if shared else columns) + 3 * 4 * 16  # three gates: given, scaled, and in the type of x


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kept_weights_give_the_same(shared: bool, per_token: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = AdapterLinear(nn.Linear(64, 96, dtype=dtype), scale=2.0)
    for index in range(4):
        layer.add_branch(f"b{index}", 4, seed=0, path="m", trunk="trunk" if shared else None)
        nn.init.normal_(layer.lora_b[f"b{index}"])
    gates = [torch.rand(2, 4), torch.rand(2, 4)]
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for length in (7, 1):
            x = torch.randn(2, length, 64, dtype=dtype)
            expected = []
            for gate in gates:
                layer.gate = gate.unsqueeze(1).expand(2, length, 4) if per_token else gate
                expected.append(layer(x))
            with layer.keep():
                for gate, value in zip([*gates, *gates], [*expected, *expected], strict=True):
                    layer.gate = gate.unsqueeze(1).expand(2, length, 4) if per_token else gate
                    torch.testing.assert_close(layer(x), value, rtol=2e-2, atol=2e-2) if dtype == torch.bfloat16 else (
                        torch.testing.assert_close(layer(x), value)
                    )
    # outside of the context, or with gradients, a change is seen
    with layer.keep():
        before = layer(x).detach()
        nn.init.normal_(layer.lora_b["b0"])
        assert not torch.equal(layer(x), before)
    assert "_kept" not in layer.state_dict() and layer._kept is None


@pytest.mark.parametrize("gates", [1, 4])
def test_branches_in_one_parameter_equal_branches_of_their_own(gates: int) -> None:
    torch.manual_seed(0)
    whole, split = AdapterLinear(nn.Linear(6, 5), scale=2.0), AdapterLinear(nn.Linear(6, 5), scale=2.0)
    split.base.load_state_dict(whole.base.state_dict())
    whole.add_branch("all", 8, seed=0, path="m", gates=gates)
    nn.init.normal_(whole.lora_b["all"])
    size = 8 // gates
    for index in range(gates):
        split.add_branch(f"b{index}", size, seed=0, path="m")
        columns = slice(index * size, (index + 1) * size)
        split.lora_a[f"b{index}"].data.copy_(whole.lora_a["all"][columns])
        split.lora_b[f"b{index}"].data.copy_(whole.lora_b["all"][:, columns])
    assert whole.num_gates == split.num_gates == gates
    for layer in (whole, split):
        layer.add_router("r", seed=0, path="m")
    assert torch.equal(whole.routers["r"], split.routers["r"])
    for gate in (torch.rand(gates), torch.rand(3, gates), torch.rand(3, 4, gates)):
        whole.gate = split.gate = gate
        x = torch.randn(3, 4, 6)
        torch.testing.assert_close(whole(x), split(x))
    whole.merge(gate := torch.rand(gates))
    split.gate = gate
    torch.testing.assert_close(whole(x), split(x))
