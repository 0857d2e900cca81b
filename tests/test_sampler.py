from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from mcit_lightning.data.sampler import EvalSlice, StageLoader, StageSampler, derive_seed

LENGTHS = [(n * 37) % 101 for n in range(211)]


def shares(world: int, *, epoch: int = 0, lengths: list[int] = LENGTHS, **options: Any) -> list[list[int]]:
    result = []
    for rank in range(world):
        sampler = StageSampler(lengths, batch_size=4, rank=rank, world_size=world, seed=3, **options)
        sampler.set_epoch(epoch)
        result.append(list(sampler))
        assert len(sampler) == len(result[-1])
    return result


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_sample_once_and_equal_shares(world: int, grouped: bool) -> None:
    parts = shares(world, group_by_length=grouped)
    assert len({len(part) for part in parts}) == 1
    seen = Counter(index for part in parts for index in part)
    assert set(seen) == set(range(len(LENGTHS)))
    assert seen.total() - len(LENGTHS) == -len(LENGTHS) % world


def test_order_depends_on_seed_and_epoch_only() -> None:
    torch.manual_seed(0)
    first = shares(2)
    torch.manual_seed(1)
    assert shares(2) == first
    assert shares(2, epoch=1) != first
    assert derive_seed(1, "a") == derive_seed(1, "a") != derive_seed(1, "b")


def test_fewer_samples_than_ranks_wrap() -> None:
    assert Counter(index for part in shares(3, lengths=[5]) for index in part) == {0: 3}


@pytest.mark.parametrize("world", [1, 2])
def test_grouping_makes_batches_of_similar_length(world: int) -> None:
    def spread(grouped: bool) -> float:
        total = 0
        for part in shares(world, group_by_length=grouped):
            batches = [part[start : start + 4] for start in range(0, len(part), 4)]
            total += sum(max(LENGTHS[i] for i in batch) - min(LENGTHS[i] for i in batch) for batch in batches)
        return total

    assert spread(True) < 0.2 * spread(False)
    firsts = [LENGTHS[index] for index in shares(world)[0][::4]]
    assert firsts != sorted(firsts, reverse=True), "the batches themselves are shuffled"


def test_eval_slices_cover_everything_once_without_padding() -> None:
    slices = [EvalSlice(LENGTHS, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(index for part in slices for index in part) == list(range(len(LENGTHS)))
    assert [len(part) for part in slices] == [53, 53, 53, 52]
    for part in slices:
        lengths = [LENGTHS[index] for index in part]
        assert lengths == sorted(lengths, reverse=True)


class Numbers(Dataset[Any]):
    """Index and a random number from the worker, to see that both are the same after a resume."""

    def __getitem__(self, index: int) -> tuple[int, float]:
        return index, float(torch.rand(())) if torch.utils.data.get_worker_info() else 0.0


def make_loader(workers: int = 0, **changes: Any) -> StageLoader:
    options: dict[str, Any] = {"batch_size": 4, "seed": 3, **changes}
    lengths = options.pop("lengths", LENGTHS[:30])
    limit = options.pop("epoch_batches", None)
    sampler = StageSampler(lengths, **options)
    return StageLoader(Numbers(), sampler, epoch_batches=limit, num_workers=workers, collate_fn=list)


@pytest.mark.parametrize("workers", [0, 2])
def test_resumes_inside_an_epoch(workers: int) -> None:
    loader = make_loader(workers)
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        epochs.append(list(loader))
    assert len(epochs[0]) == len(loader) == 8

    loader = make_loader(workers)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    assert state["done"] == 3

    torch.rand(7)
    resumed = make_loader(workers)
    batches = iter(resumed)
    resumed.load_state_dict(state)
    resumed.order.set_epoch(0)
    rest = list(batches)
    assert [[index for index, _ in batch] for batch in rest] == [[index for index, _ in b] for b in epochs[0][3:]]
    assert resumed.state_dict()["done"] == 0
    resumed.order.set_epoch(1)
    assert list(resumed) == epochs[1]


def test_nothing_is_drawn_before_the_first_batch() -> None:
    loader = make_loader()
    batches = iter(loader)
    loader.order.set_epoch(5)
    drawn = [index for batch in batches for index, _ in batch]
    assert drawn == list(loader.order)


def test_global_random_state_is_untouched() -> None:
    before = torch.random.get_rng_state()
    list(make_loader(2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_limited_epoch_ends_at_zero() -> None:
    loader = make_loader(epoch_batches=3)
    batches = iter(loader)
    for expected in (1, 2, 0):
        next(batches)
        assert loader.state_dict()["done"] == expected


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"batch_size": 8}, "batch_size"),
        ({"world_size": 2}, "world_size"),
        ({"lengths": LENGTHS[:29]}, "samples"),
        ({"seed": 4}, "seed"),
        ({"group_by_length": False}, "group_by_length"),
    ],
)
def test_refuses_another_layout(change: dict[str, Any], key: str) -> None:
    state = make_loader().state_dict()
    with pytest.raises(ValueError, match=f"saved with {key}="):
        make_loader(**change).load_state_dict(state)
