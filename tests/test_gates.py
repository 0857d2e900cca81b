"""Gates on one linear whose logits are known: which branches, how much, and what a gradient reaches."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.gates import GateState, RouterGate

LN2, LN3 = math.log(2), math.log(3)


def gate(*routers: list[list[float]], **options: Any) -> RouterGate:
    """A gate whose routers' rows are given; with the input [1, 0, 0] the first column holds the logits."""
    layer = AdapterLinear(nn.Linear(3, 5), scale=1.0)
    for index in range(len(routers[0])):
        layer.add_branch(f"expert{index}", 2, seed=0, path="q", trunk="trunk")
    for number, rows in enumerate(routers):
        layer.add_router(f"task{number}", seed=0, path="q")
        layer.routers[f"task{number}"].data.copy_(torch.tensor(rows))
    options = {"top_k": 2, "gate_input": "first", "normalize": False, **options}
    return RouterGate("q", layer, **options)


def state(mask: list[list[int]], **options: Any) -> GateState:
    return GateState(mask=torch.tensor(mask), **{"router": "task0", **options})


def column(*logits: float) -> list[list[float]]:
    return [[logit, 0.0, 0.0] for logit in logits]


ONE = torch.tensor([[[1.0, 0, 0], [0, 0, 0]]])


def test_top_k_by_hand() -> None:
    """Logits ln 1, ln 2, ln 3, ln 2 - 9: the chosen are 2 and 1, as 3 : 2."""
    rows = column(0, LN2, LN3, LN2 - 9)
    renormalized = gate(rows)
    renormalized.state = state([[1, 1]])
    torch.testing.assert_close(renormalized(ONE), torch.tensor([[0, 0.4, 0.6, 0]]))
    masked = gate(rows, renormalize=False)
    masked.state = state([[1, 1]])
    total = 6 + 2 * math.exp(-9)
    torch.testing.assert_close(masked(ONE), torch.tensor([[0, 2 / total, 3 / total, 0]]))
    dense = gate(rows, top_k=None)
    dense.state = state([[1, 1]])
    torch.testing.assert_close(dense(ONE)[0, :3], torch.tensor([1.0, 2, 3]) / total)
    # softmax over all, masked and renormalised, is the softmax over the chosen
    torch.testing.assert_close(masked(ONE) / masked(ONE).sum(), renormalized(ONE))


@pytest.mark.parametrize(("top_k", "renormalize", "learns"), [(1, True, False), (1, False, True), (2, True, True)])
def test_the_router_of_a_single_branch_learns_without_renormalising_only(
    top_k: int, renormalize: bool, learns: bool
) -> None:
    tried = gate(column(0.1, 0.4, 0.2), top_k=top_k, renormalize=renormalize)
    tried.state = state([[1, 1]])
    (tried(ONE) * torch.tensor([[1.0, 5, 2]])).sum().backward()
    gradient = tried.layer.routers["task0"].grad
    assert gradient is not None and bool(gradient.abs().max() > 1e-4) is learns


@pytest.mark.parametrize(("gate_input", "seen"), [("first", [2, 0, 0]), ("last", [0, 4, 0]), ("mean", [1, 2, 0])])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_the_router_reads_is_the_prompt_without_padding(gate_input: str, seen: list[float], side: str) -> None:
    read = gate(column(0.0, 1.0), gate_input=gate_input)
    tokens, rubbish = [[2.0, 0, 0], [0, 4.0, 0]], [[9.0, 9, 9], [7.0, 7, 7]]
    x = torch.tensor([rubbish + tokens if side == "left" else tokens + rubbish])
    mask = [[0, 0, 1, 1]] if side == "left" else [[1, 1, 0, 0]]
    assert read._read(x, state(mask)).tolist() == [seen]


def test_normalised_input_has_unit_root_mean_square() -> None:
    rows = [[1.0, 0, 0], [0, 1, 0]]
    plain, normalized = gate(rows), gate(rows, normalize=True)
    x = torch.tensor([[[3e4, 4e4, 0.0]]])
    plain.state = normalized.state = state([[1]])
    assert plain(x).tolist() == [[0.0, 1.0]]
    expected = torch.tensor([[3.0, 4.0]]) / (25 / 3) ** 0.5
    torch.testing.assert_close(normalized(x), expected.softmax(-1))


def test_extreme_activations_in_bfloat16_stay_finite_and_sum_to_one() -> None:
    torch.manual_seed(0)
    wide = gate(torch.randn(8, 3).tolist(), normalize=True)
    wide.state = state([[1, 1], [1, 1]])
    x = torch.randn(2, 2, 3).to(torch.bfloat16)
    x[:, 0] *= 1e4
    with torch.autocast("cpu", torch.bfloat16):
        found = wide(x)
    assert found.dtype == torch.float32 and found.isfinite().all()
    torch.testing.assert_close(found.sum(-1), torch.ones(2))
    with torch.autocast("cpu", torch.bfloat16):
        whole = wide.layer(x)
    assert whole.dtype == torch.bfloat16


@pytest.mark.parametrize("gate_input", ["first", "token"])
def test_an_inactive_sample_gets_no_branch_at_all(gate_input: str) -> None:
    shared = gate(column(0.0, 1.0, 2.0), gate_input=gate_input)
    shared.layer.gate = shared
    for branch in shared.layer.lora_b.values():
        nn.init.ones_(branch)
    x = torch.randn(2, 4, 3)
    shared.state = state([[1] * 4] * 2, active=torch.tensor([1.0, 0.0]))
    y = shared.layer(x)
    assert torch.equal(y[1], shared.layer.base(x)[1]) and not torch.equal(y[0], shared.layer.base(x)[0])
    # three beams of each sample
    y = shared.layer(x.repeat_interleave(3, 0))
    base = shared.layer.base(x.repeat_interleave(3, 0))
    assert torch.equal(y[3:], base[3:]) and (y[:3] != base[:3]).any(-1).all()


def test_noise_of_a_sample_moves_all_its_tokens_alike() -> None:
    noisy = gate(column(0.0, 0.0, 0.0), gate_input="token", top_k=2)
    noisy.state = state([[1] * 4] * 2, noise={"q": torch.tensor([[0.0, LN2, 0.5], [0.0, -9.0, LN2]])})
    found = noisy(torch.randn(2, 4, 3))
    assert (found > 0).tolist() == [[[False, True, True]] * 4, [[True, False, True]] * 4]
    torch.testing.assert_close(found[1, :, 2], torch.full((4,), 2 / 3))


def test_router_of_each_sample_and_of_its_beams() -> None:
    two = gate(column(5.0, 0, 0, 5.0), column(0, 5.0, 5.0, 0))
    two.state = state([[1], [1], [1]], router=None, choice=torch.tensor([1, 0, 1]))
    chosen = [[False, True, True, False], [True, False, False, True], [False, True, True, False]]
    x = torch.tensor([[[1.0, 0, 0]]] * 3)
    assert (two(x) > 0).tolist() == chosen
    assert (two(x.repeat_interleave(2, 0)) > 0).tolist() == [row for row in chosen for _ in range(2)]


def test_counts_are_of_samples_or_of_the_prompts_tokens() -> None:
    rows = column(0, LN2, LN3)
    mask = [[0, 1, 1], [1, 1, 0]]
    x = torch.tensor([[[1.0, 0, 0]] * 3] * 2)

    def counted(**options: Any) -> Tensor:
        one = gate(rows, **options)
        one.state = state(mask, counting=True)
        one(x)
        one(x)  # a recomputed forward
        return one.state.usage("q")

    torch.testing.assert_close(counted(), torch.tensor([[0.0, 2, 2], [0, 0.8, 1.2]]))
    torch.testing.assert_close(counted(gate_input="token"), torch.tensor([[0.0, 4, 4], [0, 1.6, 2.4]]))
    quiet = gate(rows)
    quiet.state = state(mask)
    quiet(x)
    assert not quiet.state.used


def test_a_generation_keeps_the_gate_of_its_prefill() -> None:
    kept = gate(column(0, LN2, LN3))
    kept.state = state([[0, 1]], generating=True)
    prefill = kept(torch.tensor([[[9.0, 9, 9], [1, 0, 0]]]))
    assert torch.equal(kept(torch.tensor([[[-5.0, 0, 0]]])), prefill)
    training = gate(column(0, LN2, LN3))
    training.state = state([[1, 1]])
    assert not torch.equal(training(ONE), training(-ONE))
