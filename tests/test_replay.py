"""Experience replay: what the buffer keeps, and that every rank, epoch and resumed run sees the same mixture."""

from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from smoke_runs import small_experiment
from stage_steps import TASKS, Make, Steps

from mcit_lightning.data.replay import ReplaySampler, kept_rows
from mcit_lightning.runner import run
from mcit_lightning.strategies import ReplayConfig


def test_a_smaller_buffer_is_the_beginning_of_a_larger_one() -> None:
    large = kept_rows(50, 20, seed=1, task="a").tolist()
    assert kept_rows(50, 7, seed=1, task="a").tolist() == large[:7]
    assert len(set(large)) == 20 and len(kept_rows(5, 9, seed=1, task="a")) == 5
    assert kept_rows(50, 20, seed=1, task="b").tolist() != large != kept_rows(50, 20, seed=2, task="a").tolist()


@pytest.mark.parametrize(
    ("own", "buffer", "batch", "replayed", "world"), [(13, 5, 4, 1, 2), (20, 3, 8, 5, 1), (7, 9, 2, 1, 3)]
)
def test_every_batch_of_every_rank_has_its_share(own: int, buffer: int, batch: int, replayed: int, world: int) -> None:
    lengths = np.arange(own + buffer) % 6
    ranks = []
    for rank in range(world):
        sampler = ReplaySampler(
            lengths, own=own, replayed=replayed, batch_size=batch, rank=rank, world_size=world, seed=3
        )
        indices = list(sampler)
        assert len(indices) == len(sampler)
        ranks.append([indices[start : start + batch] for start in range(0, len(indices), batch)])
    assert len({len(batches) for batches in ranks}) == 1
    for batches in ranks:
        assert all(sum(index >= own for index in indices) == replayed for indices in batches)
        assert all(len(indices) == batch for indices in batches[:-1])
    shown = Counter(index for batches in ranks for indices in batches for index in indices)
    assert set(range(own)) <= set(shown) and sum(shown[index] - 1 for index in range(own)) < world
    again = [shown[index] for index in range(own, own + buffer)]
    assert max(again) - min(again) <= 1, "no sample comes back before all were shown"


def test_the_buffer_goes_on_where_the_last_epoch_stopped() -> None:
    sampler = ReplaySampler(np.ones(4 + 10), own=4, replayed=1, batch_size=2, seed=5)
    shown = []
    for epoch in range(5):
        sampler.set_epoch(epoch)
        order = list(sampler)
        shown += [index for index in order if index >= 4]
        assert sorted(index for index in order if index < 4) == [0, 1, 2, 3]
    assert sorted(shown[:10]) == sorted(shown[10:]) == list(range(4, 14))


def seen(steps: Steps, stage: int, **state: Any) -> list[list[tuple[str, int]]]:
    """Task and row of each sample, by batch."""
    steps.stream.stage = stage
    loader = steps.stream.train_dataloader()
    if state:
        loader.load_state_dict(state)
    return [list(zip(batch["task"], batch["index"], strict=True)) for batch in loader]


def test_the_buffer_is_shared_equally_and_only_drops(steps: Make) -> None:
    make = steps("replay", buffer=7)
    rows = [{sample for batch in seen(make, stage) for sample in batch} for stage in range(3)]
    counts = [Counter(task for task, _ in found) for found in rows]
    assert counts == [{"colours": 24}, {"shapes": 24, "colours": 7}, {"counts": 24, "colours": 4, "shapes": 3}]
    assert {s for s in rows[2] if s[0] == "colours"} < {s for s in rows[1] if s[0] == "colours"}


def test_the_ratio_sampler_fills_half_of_every_batch(steps: Make) -> None:
    batches = seen(steps("replay", buffer=5, share=0.5), 2)
    assert len(batches) == 12
    assert all(Counter(task for task, _ in batch)["counts"] == 2 for batch in batches)
    assert len({sample for batch in batches for sample in batch}) == 24 + 5


@pytest.mark.parametrize("share", [None, 0.25])
def test_the_mixture_resumes_inside_an_epoch(steps: Make, share: float | None) -> None:
    make = steps("replay", buffer=6, share=share)
    whole = seen(make, 1)
    make.stream.stage = 1
    loader = make.stream.train_dataloader()
    for _ in islice(loader, 3):
        pass
    assert seen(make, 1, **loader.state_dict()) == whole[3:]


def test_replayed_rows_are_not_counted_as_the_tasks_own(steps: Make) -> None:
    make = steps("replay", config={"data": {"max_length": 29}})
    list(seen(make, 0))
    own = make.stream.report()["colours"]["shortened"] + make.stream.report()["colours"]["dropped"]
    assert own == 24
    list(seen(make, 1))
    assert make.stream.report()["colours"]["shortened"] == make.stream.report()["colours"]["dropped"] == 0


def test_a_share_that_does_not_fit_is_refused_before_anything_is_evaluated(smoke_root: Path, tmp_path: Path) -> None:
    config = small_experiment(smoke_root, tmp_path / "run", "strategy={name: replay, share: 0.05}")
    with pytest.raises(ValueError, match=r"strategy.share: 0.05 of a batch of 4 is 0 replayed and 4 new.*batch_size"):
        run(config)
    assert not (tmp_path / "run/predictions").exists()


def test_the_dry_run_counts_what_is_replayed(steps: Make) -> None:
    from mcit_lightning.dry_run.steps import count_steps

    rows = dict.fromkeys(TASKS, 24)
    for options in ({"buffer": 7}, {"buffer": 5, "share": 0.5}):
        make = steps("replay", **options)
        counted = count_steps(make.module.config, make.stages, rows, 1, replay=make.strategy.replay)
        assert [stage.steps for stage in counted] == [len(seen(make, stage)) for stage in range(3)]


@pytest.mark.parametrize(("key", "value"), [("buffer", 0), ("share", 1.0)])
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}: is {value}"):
        ReplayConfig(**{key: value})
