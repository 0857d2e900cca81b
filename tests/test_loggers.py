import pytest
import torch
from lightning import LightningModule, Trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import DataLoader

from mcit_lightning.evaluation.results import Results
from mcit_lightning.loggers import StageTensorBoardLogger


class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).mean()
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def read(root):
    events = EventAccumulator(str(root / "tensorboard"), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def steps(events, tag):
    return [event.step for event in events.Scalars(tag)]


def make_results(rows=2):
    results = Results("e", "s", "b", 0, ["a-1", "b"], {"a-1": "anls", "b": "anls"})
    results.matrix.set_zero_shot("a-1", 1.0)
    results.matrix.set_zero_shot("b", 2.0)
    for row in range(rows):
        for column, task in enumerate(results.tasks[: row + 1]):
            results.matrix.set(row, task, 90.0 - 10 * row + column)
    return results


def test_training_steps_continue_over_stages(tmp_path):
    logger, module = StageTensorBoardLogger(tmp_path), Tiny()
    for stage in range(2):
        logger.step_offset = stage * 4
        logger.resume_from(0)
        trainer = Trainer(
            accelerator="cpu",
            logger=logger,
            max_epochs=1,
            log_every_n_steps=1,
            default_root_dir=tmp_path / f"stage_{stage}",
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(torch.ones(4, 1), batch_size=1))
    assert steps(read(tmp_path), "train/loss") == list(range(8))
    assert (
        len(list(tmp_path.glob("tensorboard/events.out.tfevents.*"))) == 1
    )  # flat: no version_0, one file per process


def test_forgetting_curves_count_stages(tmp_path):
    logger, results = StageTensorBoardLogger(tmp_path, step_offset=100), make_results()
    for stage in range(3):
        logger.log_forgetting(results, stage)
    logger.finalize("success")
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("forgetting/a-1")] == [(0, 1.0), (1, 90.0), (2, 80.0)]
    assert [(e.step, e.value) for e in events.Scalars("forgetting/b")] == [(0, 2.0), (2, 81.0)]
    assert [(e.step, e.value) for e in events.Scalars("summary/MFT")] == [(1, 90.0), (2, 85.5)]
    assert [(e.step, e.value) for e in events.Scalars("summary/BWT")] == [(2, -10.0)]
    assert [image.step for image in events.Images("accuracy_matrix")] == [0, 1, 2]
    layout = events.Tensors("custom_scalars__config__")[0].tensor_proto.string_val[0]
    assert b"^forgetting/a\\-1$" in layout and b"^summary/MAA$" in layout
    assert "hp_metric" not in events.Tags()["scalars"]


@pytest.mark.parametrize("used_before", [False, True])
def test_a_resume_hides_the_orphaned_tail(tmp_path, used_before):
    first, results = StageTensorBoardLogger(tmp_path), make_results()
    first.log_forgetting(results, 0)
    for step in range(4):
        first.log_metrics({"train/loss": 0.0}, step)
    first.log_forgetting(results, 1)
    first.step_offset = 4
    for step in range(3):  # killed after three steps of the second stage, its checkpoint holds one
        first.log_metrics({"train/loss": 0.0}, step)
    first.close()

    second = StageTensorBoardLogger(tmp_path)
    second.step_offset = 4
    if used_before:
        second.log_metrics({"other": 1.0}, 0)
    second.resume_from(1)
    for step in range(1, 4):
        second.log_metrics({"train/loss": 1.0}, step)
    second.log_forgetting(results, 2)
    second.close()
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(n, float(n >= 5)) for n in range(8)]
    assert steps(events, "forgetting/a-1") == [0, 1, 2]


def test_a_purge_at_an_early_step_keeps_the_forgetting_curves(tmp_path):
    first, results = StageTensorBoardLogger(tmp_path), make_results()
    first.log_forgetting(results, 0)
    first.log_forgetting(results, 1)
    first.close()
    second = StageTensorBoardLogger(tmp_path, step_offset=1)
    second.resume_from(0)  # hides everything from step 1 on, the curves' first stage included
    second.log_metrics({"train/loss": 1.0}, 0)
    second.log_forgetting(results, 2)
    second.close()
    events = read(tmp_path)
    assert [(e.step, e.value) for e in events.Scalars("forgetting/a-1")] == [(0, 1.0), (1, 90.0), (2, 80.0)]
    assert steps(events, "train/loss") == [1]


def test_a_row_that_a_killed_process_wrote_is_not_written_twice(tmp_path):
    first, results = StageTensorBoardLogger(tmp_path), make_results()
    first.log_forgetting(results, 0)
    first.log_forgetting(results, 1)
    first.close()
    second = StageTensorBoardLogger(tmp_path)  # killed before the stage was marked as done: it is evaluated again
    second.log_forgetting(results, 1)
    second.step_offset = 1
    second.resume_from(0)
    second.log_metrics({"train/loss": 1.0}, 0)
    second.log_forgetting(results, 2)
    second.close()
    assert steps(read(tmp_path), "forgetting/a-1") == [0, 1, 2]
    assert steps(read(tmp_path), "summary/MAA") == [1, 2]
