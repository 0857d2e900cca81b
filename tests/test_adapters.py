"""The adapter layer against the formula written as a loop, and its invariants."""

import pytest
import torch
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear


def layer(branches: int, *, rank: int = 2, shared: bool = False, scale: float = 2.0) -> AdapterLinear:
    torch.manual_seed(0)
    result = AdapterLinear(nn.Linear(6, 5), scale=scale)
    for index in range(branches):
        result.add_branch(f"b{index}", rank, seed=1, path="m", trunk="trunk" if shared else None)
    for parameter in result.lora_b.values():
        nn.init.normal_(parameter)
    return result


def loop(module: AdapterLinear, x: Tensor, gate: Tensor | None) -> Tensor:
    """The formula, branch by branch; `gate` is broadcastable to [B, S, E]."""
    y = module.base(x)
    for index, (name, b) in enumerate(module.lora_b.items()):
        a = module.lora_a[module.trunk_of[name]]
        weight = 1.0 if gate is None else gate[..., index, None]
        y = y + module.scale * weight * (x @ a.T @ b.T)
    return y


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("length", [2, 7])
@pytest.mark.parametrize("shape", [None, (3,), (4, 3), (4, 1, 3)])
def test_equals_the_loop_over_branches(shared: bool, length: int, shape: tuple[int, ...] | None) -> None:
    module = layer(3, shared=shared)
    x = torch.randn(4, length, 6)
    gate = None if shape is None else torch.rand(shape)
    gate = gate.expand(4, length, 3) if gate is not None and gate.dim() == 3 else gate
    module.gate = gate
    expanded = gate[:, None] if gate is not None and gate.dim() == 2 else gate
    torch.testing.assert_close(module(x), loop(module, x, expanded))


def test_branches_of_different_rank() -> None:
    module = layer(1)
    module.add_branch("wide", 4, seed=1, path="m")
    nn.init.normal_(module.lora_b["wide"])
    x, gate = torch.randn(4, 7, 6), torch.rand(4, 2)
    module.gate = gate
    torch.testing.assert_close(module(x), loop(module, x, gate[:, None]))


def test_only_the_branches_in_use_are_computed() -> None:
    module, x = layer(3), torch.randn(4, 7, 6)
    gate = torch.rand(4, 3)
    gate[:, 1] = 0.0
    expected = loop(module, x, gate[:, None])
    module.lora_a["b1"].data.fill_(torch.nan)  # would show
    module.use(["b0", "b2"])
    module.gate = gate[:, [0, 2]]
    torch.testing.assert_close(module(x), expected)
    module.use([])
    assert torch.equal(module(x), module.base(x))
    with pytest.raises(ValueError, match="unknown branch b9; there are b0, b1, b2"):
        module.use(["b9"])
    with pytest.raises(ValueError, match="share a trunk"):
        layer(3, shared=True).use(["b0"])


def test_a_gate_may_be_computed_from_the_input() -> None:
    module, x = layer(3), torch.randn(4, 7, 6)
    module.gate = lambda h: h[..., :3].softmax(-1)
    torch.testing.assert_close(module(x), loop(module, x, x[..., :3].softmax(-1)))


def test_new_branches_do_not_change_the_output() -> None:
    base = nn.Linear(6, 5)
    x = torch.randn(2, 3, 6)
    expected = base(x)
    module = AdapterLinear(base, scale=2.0)
    assert torch.equal(module(x), expected)
    module.add_branch("a", 2, seed=0, path="m")
    assert torch.equal(module(x), expected)


def test_gates_act_on_each_sample_alone() -> None:
    module = layer(3)
    x, gate = torch.randn(4, 7, 6), torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]])
    module.gate = gate
    together = module(x)
    for row in range(4):
        module.gate = gate[row : row + 1]
        torch.testing.assert_close(module(x[row : row + 1]), together[row : row + 1], rtol=0, atol=1e-6)
    assert torch.equal(together[3], module.base(x[3]))


def test_unselected_and_frozen_branches_and_the_base_do_not_move() -> None:
    module = layer(3)
    module.lora_b["b1"].requires_grad_(False)
    module.gate = torch.tensor([1.0, 1.0, 0.0])
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        module(torch.randn(4, 7, 6)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {name for name, parameter in module.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {"lora_a.b0", "lora_b.b0", "lora_a.b1"}


def test_initial_values_depend_on_seed_path_and_trunk_only() -> None:
    def a(seed: int, path: str, name: str = "x") -> Tensor:
        module = AdapterLinear(nn.Linear(6, 5), scale=1.0)
        torch.rand(3)  # the global generator has no part in it
        module.add_branch(name, 2, seed=seed, path=path)
        return module.lora_a[name]

    assert torch.equal(a(1, "p"), a(1, "p"))
    assert not torch.equal(a(1, "p"), a(2, "p"))
    assert not torch.equal(a(1, "p"), a(1, "q"))
    assert not torch.equal(a(1, "p"), a(1, "p", "y"))


def test_adding_a_branch_twice_changes_nothing_and_another_rank_is_refused() -> None:
    module = layer(2)
    before = [p.clone() for p in module.lora_b.values()]
    module.add_branch("b0", 2, seed=9, path="m")
    assert len(module.lora_b) == 2 and all(
        torch.equal(x, y) for x, y in zip(before, module.lora_b.values(), strict=True)
    )
    with pytest.raises(ValueError, match="'b0' has rank 2, asked for 3"):
        module.add_branch("b0", 3, seed=9, path="m")


def test_autocast_keeps_adapters_in_float32() -> None:
    module = layer(2)
    module.base.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(torch.randn(4, 7, 6, dtype=torch.bfloat16))
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and module.lora_a["b0"].dtype == torch.float32
    assert module.lora_a["b0"].grad is not None and module.lora_a["b0"].grad.dtype == torch.float32


def test_bfloat16_base_without_autocast() -> None:
    module = layer(2)
    module.base.to(torch.bfloat16)
    assert module(torch.randn(4, 7, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
