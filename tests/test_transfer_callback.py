import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader, Dataset

from callbacks.cost import StageCost
from callbacks.transfer import BackwardTransfer
from mcit_lightning.config import DataConfig, ExperimentConfig, TaskConfig
from mcit_lightning.data.records import Sample
from mcit_lightning.evaluation.predictions import drop_parts, merge_parts, prediction_file, read_predictions, write_part
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loggers import StageTensorBoardLogger
from mcit_lightning.plans import FreezeRecord, StructureLog, TaskPlan
from mcit_lightning.stages import sequential_stages

TASKS = ["a", "b"]
ROWS = [1, 4, 5, 9, 12]
"""Numbers of the test rows in use, as a limited test split has them."""


class Split(Dataset):
    def __init__(self, task, picture):
        self.task, self.picture = task, str(picture)

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return Sample(
            str(ROWS[index]), self.task, (self.picture,), (("user", "what?"),), reference="yes", row=ROWS[index]
        )


def collate(samples):
    return {
        "task": [s.task for s in samples],
        "id": [s.id for s in samples],
        "index": [s.row for s in samples],
        "num_tokens": 10 * len(samples),
    }


class Stream(LightningDataModule):
    def __init__(self, picture):
        super().__init__()
        self.too_long = False
        self.stages, self.index, self.test_tasks = sequential_stages(TASKS), 0, TASKS
        self.splits = {task: Split(task, picture) for task in TASKS}

    @property
    def stage(self):
        return self.stages[self.index]

    def split(self, task, split):
        return self.splits[task]

    def evaluate_only(self, tasks):
        self.test_tasks = tasks

    def check_trained(self):
        if self.too_long:
            raise ValueError("trains on nothing")

    def report(self):
        return {task: {"shortened": 3, "dropped": 0} for task in TASKS}

    def train_dataloader(self):
        return DataLoader(self.splits[self.stage.name], batch_size=2, collate_fn=collate)

    def val_dataloader(self):
        return DataLoader(self.splits[self.stage.name], batch_size=5, collate_fn=collate)

    def test_dataloader(self):
        return [DataLoader(self.splits[task], batch_size=2, collate_fn=collate) for task in self.test_tasks]


class Tiny(LightningModule):
    """Answers with the letter of the task that it was trained on last."""

    def __init__(self):
        super().__init__()
        self.adapter, self.base = torch.nn.Linear(1, 2, bias=False), torch.nn.Linear(3, 3)
        self.base.requires_grad_(False)
        self.results = Results("exp", "sequential", "tiny", 0, TASKS, dict.fromkeys(TASKS, "exact_match"))
        self.knows = ""
        self.scores = {}
        self.routes = None
        self.config = ExperimentConfig(tasks={task: TaskConfig() for task in TASKS}, data=DataConfig(eval_batch_size=2))
        self.eval_cost = {"routing": 0.0, "first_routing": 0.0, "generation": 0.0, "examined": 0.0}
        self.structure = StructureLog()
        self.towers = SimpleNamespace(adapters={}, tower_of=lambda path: "language")

    def saved_keys(self):
        return {"adapter.weight"}

    def training_step(self, batch, batch_idx):
        self.knows = batch["task"][0]
        return self.adapter.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.adapter.parameters(), lr=0.1)

    def on_test_start(self):
        self.scores = {}
        self.eval_cost = {"routing": 0.0, "first_routing": 0.0, "generation": 0.0, "examined": 0.0}

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        rows = []
        for task, index in zip(batch["task"], batch["index"], strict=True):
            score = float(task == self.knows or index == 1)
            self.scores.setdefault(task, []).append(score)
            rows.append(
                {
                    "index": index,
                    "prompt": "what?",
                    "text": "yes" if score else "no",
                    "answer": "yes",
                    "score": score,
                    "task": task,
                    **({} if self.routes is None else {"routed_to": self.routes[task]}),
                }
            )
        self.eval_cost["routing"] += 0.5 * len(rows)
        self.eval_cost["generation"] += 2.0 * len(rows)
        if self.knows == TASKS[0]:
            self.eval_cost["first_routing"] += 0.75 * len(rows)
            self.eval_cost["examined"] += len(rows)
        return rows[::-1]

    def on_test_epoch_end(self):
        values = {f"test/{task}/exact_match": 100 * sum(s) / len(s) for task, s in self.scores.items()}
        self.log_dict(values, logger=False)


@pytest.fixture
def parts(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.png")
    root = tmp_path / "run"
    root.mkdir()
    (root / "config.yaml").write_text("name: exp # <config>\n")
    return root, Tiny(), Stream(tmp_path / "picture.png"), StageTensorBoardLogger(root)


def trainer(root, folder, logger, *more, **options):
    return Trainer(
        accelerator="cpu",
        logger=logger,
        default_root_dir=root / folder,
        callbacks=[StageCost(), BackwardTransfer(), *more],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **{"max_epochs": 2, "log_every_n_steps": 1, **options},
    )


def test_a_whole_run(parts, capsys):
    root, module, stream, logger = parts
    trainer(root, "zero_shot", logger).test(module, datamodule=stream, verbose=False)
    for index in range(2):
        stream.index, stream.test_tasks = index, TASKS[: index + 1]
        stage_trainer = trainer(root, stream.stage.folder, logger)
        stage_trainer.fit(module, datamodule=stream)
        stage_trainer.test(module, datamodule=stream, verbose=False)

    results = Results.load(root)
    assert results.to_dict() == module.results.to_dict()
    assert results.zero_shot == pytest.approx([20, 20])
    assert results.matrix.scores[0][0] == pytest.approx(100) and results.matrix.scores[0][1] is None
    assert results.matrix.scores[1] == pytest.approx([20, 100])
    assert results.notes["data"]["a"]["shortened"] == 3
    for row, cost in enumerate(results.cost):
        assert (cost.stage, cost.folder, cost.row) == (TASKS[row], f"stage_{row + 1:02d}", row)
        assert (cost.trainable_params, cost.stored_params) == (2, 2)
        assert cost.train_seconds > 0 and cost.eval_seconds > 0 and cost.peak_memory_bytes > 2**20
        assert cost.train_samples_per_second == pytest.approx(10 / cost.train_seconds)
        assert (cost.routing_seconds_per_sample, cost.generation_seconds_per_sample) == (0.5, 2.0)
        assert cost.first_routing_seconds_per_sample == (0.75 if cost.stage == TASKS[0] else None)
        assert cost.eval_samples_per_second == pytest.approx(5 * (row + 1) / cost.eval_seconds)

    files = {
        str(path.relative_to(root / "predictions")) for path in (root / "predictions").rglob("*") if path.is_file()
    }
    evaluated = [("zero_shot", "a"), ("zero_shot", "b"), ("stage_01", "a"), ("stage_02", "a"), ("stage_02", "b")]
    assert files == {f"{folder}/{task}.jsonl" for folder, task in evaluated}
    lines = [json.loads(line) for line in prediction_file(root, "stage_02", "a").read_text().splitlines()]
    assert [line["index"] for line in lines] == ROWS
    assert (root / "accuracy_matrix.csv").read_text().splitlines()[-1] == "b,20.0000,100.0000"

    page = (root / "report.html").read_text()
    assert "name: exp # &lt;config&gt;" in page and page.count('<img src="data:image/jpeg') == 5
    events = EventAccumulator(str(root / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("forgetting/a")] == [0, 1, 2]
    assert all(event.value > 0 for event in events.Scalars("train/tokens_per_second"))
    assert "BWT −80.00" in capsys.readouterr().out


def test_routing_and_structure_are_collected_over_the_stages(parts):
    root, module, stream, logger = parts
    module.structure.append(TaskPlan("a", ranks={"lm.0": 4}))
    module.structure.append(FreezeRecord("a", {"lm.0": ["e0"]}))
    for index, routes in enumerate([{"a": ["a"], "b": []}, {"a": ["b", "a"], "b": ["b"]}]):
        stream.index, module.routes = index, routes
        trainer(root, stream.stage.folder, logger).test(module, datamodule=stream, verbose=False)
    routing = Results.load(root).routing
    assert routing["per_stage"] == {"a": 100.0, "b": 50.0}
    assert routing["rejected_per_stage"] == {"a": {"a": 0.0, "b": 100.0}, "b": {"a": 0.0, "b": 0.0}}
    assert (routing["accuracy"], routing["among"], routing["experts"]) == (50.0, 100.0, {"a": 2.0, "b": 1.0})
    assert Results.load(root).modules == {"language": {"lm.0": []}}
    assert Results.load(root).freezing == {"a": {"lm.0": ["e0"]}}


def test_train_seconds_outlive_a_resume_and_leave_out_validation(parts):
    root, module, stream, logger = parts

    class SlowValidation(Callback):
        def on_validation_epoch_end(self, trainer, pl_module):
            time.sleep(0.2)

    old = StageCost()
    old.load_state_dict({"seconds": 1000.0, "samples": 90})
    assert old.state_dict() == {"seconds": 1000.0, "samples": 90}
    stage_trainer = trainer(root, "stage_01", logger, SlowValidation())
    cost = next(callback for callback in stage_trainer.callbacks if isinstance(callback, StageCost))
    cost.load_state_dict(old.state_dict())
    stage_trainer.fit(module, datamodule=stream)
    row = Results.load(root).cost[0]
    assert 1000 < row.train_seconds < 1000.4
    assert row.train_samples_per_second == pytest.approx(100 / row.train_seconds)


def test_a_stage_that_trained_on_nothing_has_no_result(parts):
    root, module, stream, logger = parts
    stream.too_long = True
    with pytest.raises(ValueError, match="trains on nothing"):
        trainer(root, "stage_01", logger).fit(module, datamodule=stream)
    assert not (root / "results.json").exists()


class Killed(BaseException):
    pass


class KillAt(Callback):
    """Ends an evaluation at a batch, as a kill would."""

    def __init__(self, task, batch):
        self.point = (task, batch)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if (batch["task"][0], batch_idx) == self.point:
            raise Killed


@pytest.mark.parametrize(
    ("point", "kept"), [(("a", 2), ["a"]), (("b", 0), ["a"]), (("b", 2), ["a", "b"]), (("a", 1), [])]
)
def test_tasks_that_an_interrupted_evaluation_has_finished_are_kept(parts, point, kept):
    root, module, stream, logger = parts
    stream.index, module.knows = 1, "a"
    with pytest.raises(Killed):
        trainer(root, "stage_02", logger, KillAt(*point)).test(module, datamodule=stream, verbose=False)
    assert not (root / "results.json").exists()
    stream.test_tasks, module.scores = list(TASKS), {}
    trainer(root, "stage_02", logger).test(module, datamodule=stream, verbose=False)
    assert sorted(module.scores) == [task for task in TASKS if task not in kept], "evaluated again"
    results = Results.load(root)
    assert results.matrix.scores[1] == pytest.approx([100, 20])
    cost = results.cost[0]
    assert (cost.routing_seconds_per_sample, cost.generation_seconds_per_sample) == (0.5, 2.0)
    assert cost.eval_samples_per_second == pytest.approx(10 / cost.eval_seconds)
    assert sorted(path.name for path in (root / "predictions/stage_02").iterdir()) == ["a.jsonl", "b.jsonl"]
    assert list(read_predictions(root, "stage_02", "a")) == ROWS


@pytest.mark.parametrize("damage", ["missing row", "no JSON"])
def test_an_unfinished_or_damaged_part_is_evaluated_again(parts, damage):
    root, module, stream, logger = parts
    path = prediction_file(root, "stage_01", "a")
    write_part(path, 0, [{"index": row, "text": "no", "task": "a"} for row in ROWS[1:]])
    if damage == "no JSON":
        path.with_name(".a.rank0.part").write_text('{"rows": [')
    stream.test_tasks, module.knows = ["a"], "a"
    trainer(root, "stage_01", logger).test(module, datamodule=stream, verbose=False)
    assert Results.load(root).matrix.scores[0][0] == pytest.approx(100)


def test_training_makes_what_is_left_of_an_evaluation_out_of_date(parts):
    root, module, stream, logger = parts
    write_part(prediction_file(root, "stage_01", "a"), 0, [{"index": row, "text": "no", "task": "a"} for row in ROWS])
    trainer(root, "stage_01", logger).fit(module, datamodule=stream)
    assert not list((root / "predictions/stage_01").iterdir())


def test_every_row_must_be_evaluated(parts):
    root, _, stream, logger = parts
    stream.test_tasks = ["a"]

    class Loses(Tiny):
        def test_step(self, batch, batch_idx, dataloader_idx=0):
            return super().test_step(batch, batch_idx)[1:]

    with pytest.raises(RuntimeError, match=r"a\.jsonl: 2 predictions for 2 of 5 different rows"):
        trainer(root, "stage_01", logger).test(Loses(), datamodule=stream, verbose=False)
    assert not (root / "results.json").exists()


def test_an_evaluation_cut_short_on_purpose_is_accepted(parts):
    root, module, stream, logger = parts
    trainer(root, "stage_01", logger, limit_test_batches=1).test(module, datamodule=stream, verbose=False)
    assert sorted(read_predictions(root, "stage_01", "a")) == [1, 4]


def part_files(root: Path, *shares):
    path = prediction_file(root, "stage_01", "a.b")
    for rank, share in enumerate(shares):
        write_part(path, rank, [{"index": index, "rank": rank} for index in share])
    return path


def test_two_ranks_are_merged_by_index(tmp_path):
    path = part_files(tmp_path, [9, 5, 1], [12, 4])
    assert merge_parts(path, 2, 5) == 5
    drop_parts(tmp_path, "stage_01")
    rows = read_predictions(tmp_path, "stage_01", "a.b")
    assert list(rows) == ROWS and rows[4]["rank"] == 1
    assert [file.name for file in path.parent.iterdir()] == ["a.b.jsonl"]


def test_a_stale_part_of_an_earlier_larger_run_is_not_read(tmp_path):
    path = part_files(tmp_path, [0, 1], [2])
    write_part(path, 2, [{"index": 7}])
    assert merge_parts(path, 2, 3) == 3


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (([1, 4, 5], [5, 9, 12]), r"6 predictions for 5 of 5 different rows \(1 repeated; per rank \[3, 3\]\)"),
        (([1, 4], [5, 9]), r"4 predictions for 4 of 5 different rows \(0 repeated"),
        (([1, 4, 5, 9, 12],), r"ranks \[1\] of 2 are not there; .*file system"),
    ],
)
def test_ranks_that_do_not_add_up(tmp_path, shares, message):
    path = part_files(tmp_path, *shares)
    with pytest.raises(RuntimeError, match=message):
        merge_parts(path, 2, 5)
    assert not path.exists()
