import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from stream_recorder import Recorder, SaveAt, trainer

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.stages import Stage, sequential_stages

Build = Callable[..., ContinualDataModule]
ORDER = ["colours", "shapes", "counts"]
MAX_LENGTH = 30
"""Tokens at which the tasks of `mixed` have whole, shortened and dropped samples."""
JOINT = Stage(index=0, name="joint", train=tuple(ORDER), row=2)


@pytest.fixture
def build(smoke_config: Callable[..., ExperimentConfig], smoke_processor: Any) -> Build:
    """A datamodule over the smoke tasks; `tasks` changes single keys of a task."""

    def make(
        stages: list[Stage] | None = None, tasks: dict[str, dict[str, Any]] | None = None, **changes: Any
    ) -> ContinualDataModule:
        config = smoke_config(**changes)
        for name, keys in (tasks or {}).items():
            config.tasks[name] = dataclasses.replace(config.tasks[name], **keys)
        return ContinualDataModule(config, smoke_processor, stages or sequential_stages(ORDER))

    return make


@pytest.fixture
def mixed(smoke_root: Path, tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Tasks whose training rows have, in turn, a longer answer, a longer question, and neither."""
    tasks = {}
    for task in ORDER:
        rows = json.loads((smoke_root / task / "train.json").read_text())
        for turns in (row["conversations"] for row in rows[::3]):
            turns[1]["value"] += " and red and blue"
        for turns in (row["conversations"] for row in rows[1::3]):
            turns[0]["value"] += " Which colour is this? Which colour is this?"
        (tmp_path / f"{task}.json").write_text(json.dumps(rows))
        tasks[task] = {"train": str(tmp_path / f"{task}.json")}
    return tasks


def test_stages_choose_the_loaders(build: Build) -> None:
    stream = build()
    assert (stream.task, stream.test_tasks) == ("colours", ["colours"])
    stream.stage = 1
    assert (stream.stage.index, stream.task, stream.test_tasks) == (1, "shapes", ["colours", "shapes"])
    batches = list(stream.train_dataloader())
    assert Counter(task for batch in batches for task in batch["task"]) == {"shapes": 24}
    assert len({name for batch in batches for name in batch["id"]}) == 24
    assert [batch["task"] for batch in stream.val_dataloader()[0]] == [["shapes"] * 4] * 2
    with pytest.raises(ValueError, match="no stage 3"):
        stream.stage = 3


def test_test_loaders_follow_the_test_tasks(build: Build) -> None:
    stream = build()
    stream.evaluate_only(ORDER)
    loaders = stream.test_dataloader()
    assert stream.test_tasks == ORDER
    for task, loader in zip(ORDER, loaders, strict=True):
        batches = list(loader)
        assert {name for batch in batches for name in batch["task"]} == {task}
        assert sorted(index for batch in batches for index in batch["index"]) == list(range(8))
    stream.stage = 0
    assert stream.test_tasks == ["colours"]
    stream.evaluate_only(["counts"])
    stream.evaluate_only(None)
    assert stream.test_tasks == ["colours"]
    with pytest.raises(ValueError, match=r"'shape'.*Did you mean 'shapes'"):
        stream.evaluate_only(["shape"])


def test_what_a_stage_evaluates(build: Build) -> None:
    assert build(evaluate="all").test_tasks == ORDER
    only = Stage(index=0, name="x", train=("counts",), row=0, evaluate=("counts", "colours"))
    assert build([only], evaluate="all").test_tasks == ["counts", "colours"]
    assert build([dataclasses.replace(only, evaluate="all")]).test_tasks == ORDER


def test_a_joint_stage_shows_each_sample_as_often_as_the_sequence(build: Build) -> None:
    stream = build([JOINT], tasks={"shapes": {"epochs": 3}, "counts": {"epochs": 2}})
    assert stream.epochs(JOINT) == 1
    seen = Counter(
        (t, i) for batch in stream.train_dataloader() for t, i in zip(batch["task"], batch["id"], strict=True)
    )
    assert {(task, times) for (task, _), times in seen.items()} == {("colours", 1), ("shapes", 3), ("counts", 2)}
    assert len(seen) == 3 * 24
    assert len(stream.val_dataloader()) == 1
    assert stream.test_tasks == ORDER


def test_task_settings_and_fallbacks(build: Build) -> None:
    own = {"epochs": 2, "batch_size": 3, "max_new_tokens": 9, "metric": "anls", "prompt_suffix": "One word."}
    stream = build(tasks={"colours": own})
    first, second, _ = stream.stages
    assert [stream.epochs(first), stream.epochs(second)] == [2, 1]
    assert [stream.batch_size(first), stream.batch_size(second)] == [3, 4]
    assert [stream.max_new_tokens("colours"), stream.max_new_tokens("shapes")] == [9, 4]
    assert [stream.metric("colours"), stream.metric("shapes")] == ["anls", "exact_match"]
    assert stream.batch_size(JOINT) == 4
    batch = next(iter(stream.test_dataloader()[0]))
    decoded = stream.processor.tokenizer.decode(batch["inputs"]["input_ids"][0])
    assert "Answer with one word.\nOne word." in decoded


def test_no_validation_files(build: Build) -> None:
    stream = build(tasks={"colours": {"val": None}})
    assert stream.val_dataloader() == []
    stream.stage = 1
    assert len(stream.val_dataloader()) == 1


def test_everything_is_checked_at_construction(build: Build, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tasks\.counts\.train: the file .*counts/none\.json does not exist"):
        build(tasks={"counts": {"train": "counts/none.json"}})
    with pytest.raises(ValueError, match=r"tasks\.shapes\.test is not set"):
        build(tasks={"shapes": {"test": None}})
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(ValueError, match=r"empty\.json \(tasks\.counts\.val\) holds no rows"):
        build(tasks={"counts": {"val": str(tmp_path / "empty.json")}})
    row = {"question_id": 1, "text": "?", "answer": "x"}
    (tmp_path / "twice.json").write_text(json.dumps([row, row]))
    with pytest.raises(ValueError, match="repeats '1' of row 1"):
        build(tasks={"counts": {"test": str(tmp_path / "twice.json")}})


def test_untrained_tasks_need_no_training_file(build: Build) -> None:
    stream = build(sequential_stages(["colours"]), tasks={"shapes": {"train": None}, "counts": {"train": None}})
    stream.evaluate_only(["counts"])
    assert len(stream.test_dataloader()[0].dataset) == 8  # type: ignore[arg-type]


def test_limits_and_report(build: Build, mixed: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture) -> None:
    stream = build(
        [JOINT],
        tasks={**mixed, "shapes": {**mixed["shapes"], "epochs": 3}},
        data={"limit_train": 6, "limit_test": 2, "limit_val": 1, "max_length": MAX_LENGTH},
    )
    assert stream.report()["counts"] == {"shortened": 0, "dropped": 0, "test_rows": 2, "train_rows": 6, "val_rows": 1}
    for _ in range(2):
        fates = {
            (task, index, cut)
            for batch in stream.train_dataloader()
            for task, index, cut in zip(batch["task"], batch["index"], batch["cut"], strict=True)
        }
        assert len(fates) == 18
        kinds = Counter((task, cut) for task, _, cut in fates if cut is not None)
        assert len(kinds) > 3 and {cut for _, cut in kinds} == {"shortened", "dropped"}
        for task, counts in stream.report().items():
            assert (counts["shortened"], counts["dropped"]) == (kinds[task, "shortened"], kinds[task, "dropped"])
    said = [record.message for record in caplog.records if f"max_length={MAX_LENGTH}" in record.message]
    assert len(said) == len(kinds)
    for task, cut in kinds:
        what = "text is cut off" if cut == "shortened" else "no answer token is left"
        assert len([message for message in said if f"Task {task} " in message and what in message]) == 1
    stream.stage = 0
    assert stream.report()["counts"]["shortened"] == 0


def test_differing_batch_sizes_of_a_joint_stage_are_said(build: Build, caplog: pytest.LogCaptureFixture) -> None:
    stream = build([JOINT], tasks={"shapes": {"batch_size": 2}})
    stream.train_dataloader()
    said = "(colours: 4, shapes: 2, counts: 4): it uses data.batch_size=4"
    assert len([record for record in caplog.records if said in record.message]) == 1
    caplog.clear()
    build(tasks={"shapes": {"batch_size": 2}})
    assert not caplog.records


def test_a_task_without_any_answer_left_is_an_error(build: Build) -> None:
    stream = build(data={"max_length": 20})
    seen = []
    with pytest.raises(ValueError, match=r"Task 'colours' .* its 24 .*max_length=20\. .*longest \d+, image") as raised:
        seen += [batch["length"] for batch in stream.train_dataloader()]
    longest = int(str(raised.value).split("longest ")[1].split(",")[0])
    assert f"to {longest} to keep" in str(raised.value)
    enough = build(data={"max_length": longest})
    assert max(length for batch in enough.train_dataloader() for length in batch["length"]) == longest
    assert enough.report()["colours"]["dropped"] == enough.report()["colours"]["shortened"] == 0
    with pytest.raises(ValueError, match=r"Task 'colours' trains on nothing"):
        stream.check_trained()


def test_counts_are_over_all_ranks_and_outlive_a_resume(build: Build, mixed: dict[str, dict[str, Any]]) -> None:
    data = {"max_length": MAX_LENGTH, "batch_size": 3}
    whole = build(tasks=mixed, data=data)
    list(whole.train_dataloader())
    expected = whole.report()
    assert (expected["colours"]["shortened"], expected["colours"]["dropped"]) == (8, 8)

    def meet() -> list[ContinualDataModule]:
        """Five ranks, so that the tail repeats a sample, that exchange what they know whenever they reduce."""
        ranks = [build(tasks=mixed, data=data) for _ in range(5)]
        for rank, stream in enumerate(ranks):
            stream.trainer = _Ranks(rank, 5)  # type: ignore[assignment]
        return ranks

    def reduce_all(ranks: list[ContinualDataModule], steps: list[Callable[[], Any]]) -> list[Any]:
        """Run the ranks one after the other, twice: the second time each gets the maximum of what all gave."""
        calls: list[list[torch.Tensor]] = [[] for _ in ranks]
        for stream, step, given in zip(ranks, steps, calls, strict=True):
            stream.trainer.strategy = _Strategy(lambda values, given=given: given.append(values) or values)  # type: ignore[union-attr, misc]
            step()
        largest = [torch.stack(values).amax(0) for values in zip(*calls, strict=True)]
        results = []
        for stream, step in zip(ranks, steps, strict=True):
            queue = iter(largest)
            stream.trainer.strategy = _Strategy(lambda values, queue=queue: next(queue))  # type: ignore[union-attr, misc]
            results.append(step())
        return results

    ranks = meet()
    loaders = [stream.train_dataloader() for stream in ranks]
    for loader in loaders:
        next(iter(loader))
    states = reduce_all(ranks, [loader.state_dict for loader in loaders])
    assert states[0]["done"] == 1

    ranks = meet()
    loaders = [stream.train_dataloader() for stream in ranks]
    for stream, loader in zip(ranks, loaders, strict=True):
        loader.load_state_dict(states[0])  # a checkpoint holds the first rank's state only
        stream.trainer.strategy = _Strategy(lambda values: values)  # type: ignore[union-attr]
        list(loader)
    reduce_all(ranks, [stream.check_trained for stream in ranks])
    for stream in ranks:
        assert stream.report() == expected


def test_a_changed_file_is_refused_on_resume(build: Build) -> None:
    state = build(data={"limit_train": 8}).train_dataloader().state_dict()
    state["observer"]["colours"]["fate"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"tasks\.colours\.train: .* saved with 3 rows, now there are 24"):
        build(data={"limit_train": 8}).train_dataloader().load_state_dict(state)


def test_ranks_share_the_data(build: Build) -> None:
    stream = build()
    seen: list[str] = []
    tested: list[int] = []
    for rank in range(3):
        stream.trainer = _Ranks(rank, 3)  # type: ignore[assignment]
        loader = stream.train_dataloader()
        assert len(loader) == 2
        seen += [name for batch in loader for name in batch["id"]]
        tested += [index for batch in stream.test_dataloader()[0] for index in batch["index"]]
    assert len(set(seen)) == len(seen) == 24
    assert sorted(tested) == list(range(8))
    stream.trainer = _Ranks(0, 9)  # type: ignore[assignment]
    with pytest.raises(ValueError, match="8 test rows for 9 processes"):
        stream.test_dataloader()


@dataclasses.dataclass
class _Ranks:
    global_rank: int
    world_size: int
    limit_train_batches: float = 1.0
    strategy: Any = None

    def __post_init__(self) -> None:
        self.strategy = _Strategy(lambda values: values)


@dataclasses.dataclass
class _Strategy:
    exchange: Callable[[torch.Tensor], torch.Tensor]
    root_device: str = "cpu"

    def reduce(self, values: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "max"
        return self.exchange(values)


# Lightning


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("workers", "step"), [(0, 3), (0, 6), (0, 8), (2, 8)])
def test_lightning_resumes_inside_an_epoch(build: Build, tmp_path: Path, workers: int, step: int) -> None:
    whole = Recorder()
    trainer(tmp_path, SaveAt(tmp_path / "last.ckpt", step)).fit(whole, datamodule=build(data={"num_workers": workers}))
    assert len(whole.seen) == 18
    resumed = Recorder()
    again = build(data={"num_workers": workers})
    trainer(tmp_path).fit(resumed, datamodule=again, ckpt_path=tmp_path / "last.ckpt")
    assert resumed.seen == whole.seen[step:]
    assert resumed.weight.equal(whole.weight)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("step", [2, 3, 5])
def test_lightning_resumes_the_counts(
    build: Build, mixed: dict[str, dict[str, Any]], tmp_path: Path, step: int
) -> None:
    data = {"max_length": MAX_LENGTH}
    whole, again = build(tasks=mixed, data=data), build(tasks=mixed, data=data)
    options: dict[str, Any] = {"limit_train_batches": 3}
    trainer(tmp_path, SaveAt(tmp_path / "last.ckpt", step), **options).fit(Recorder(), datamodule=whole)
    trainer(tmp_path, max_epochs=2, **options).fit(Recorder(), datamodule=again, ckpt_path=tmp_path / "last.ckpt")
    whole = build(tasks=mixed, data=data)
    trainer(tmp_path, max_epochs=2, **options).fit(Recorder(), datamodule=whole)
    assert again.report() == whole.report()
    assert whole.report()["colours"]["shortened"] + whole.report()["colours"]["dropped"] > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("limit", [1.0, 2])
def test_lightning_does_not_finish_an_epoch_on_nothing(build: Build, tmp_path: Path, limit: float) -> None:
    class Ended(L.Callback):
        def on_train_epoch_end(self, *args: Any) -> None:
            raise AssertionError

    with pytest.raises(ValueError, match=r"Task 'colours' trains on nothing.*data\.max_length=20"):
        trainer(tmp_path, Ended(), limit_train_batches=limit).fit(Recorder(), datamodule=build(data={"max_length": 20}))


@pytest.mark.filterwarnings("ignore")
def test_lightning_refuses_another_batch_size(build: Build, tmp_path: Path) -> None:
    trainer(tmp_path, SaveAt(tmp_path / "last.ckpt", 2), max_epochs=1).fit(Recorder(), datamodule=build())
    with pytest.raises(ValueError, match="batch_size=4"):
        trainer(tmp_path).fit(Recorder(), datamodule=build(data={"batch_size": 8}), ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore")
def test_lightning_limited_epochs_resume(build: Build, tmp_path: Path) -> None:
    whole, resumed = Recorder(), Recorder()
    trainer(tmp_path, SaveAt(tmp_path / "last.ckpt", 4), limit_train_batches=2).fit(whole, datamodule=build())
    trainer(tmp_path, limit_train_batches=2).fit(resumed, datamodule=build(), ckpt_path=tmp_path / "last.ckpt")
    assert len(whole.seen) == 6
    assert resumed.seen == whole.seen[4:]


@pytest.mark.filterwarnings("ignore")
def test_lightning_tests_every_task(build: Build, tmp_path: Path) -> None:
    stream, module = build(), Recorder()
    stream.stage = 2
    trainer(tmp_path).test(module, datamodule=stream, verbose=False)
    assert Counter(index for index, _ in module.tested) == {0: 8, 1: 8, 2: 8}
