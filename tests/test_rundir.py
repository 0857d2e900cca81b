"""What a run directory refuses, and what it makes good again."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import kill
import pytest
import torch
from smoke_runs import adapters, assert_same_run

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.rundir import RunDirectory
from mcit_lightning.runner import run


def test_a_finished_run_is_not_started_over(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"finished.*overwrite=true.*out=DIR"):
        run(experiment(uninterrupted))


def test_overwrite_starts_over(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    short = ["order=[colours]", "zero_shot=false", "tasks.colours.epochs=1"]
    run(experiment(tmp_path / "run", *short))
    (tmp_path / "run" / "stage_01" / "leftover").touch()
    run(experiment(tmp_path / "run", *short, "overwrite=true"))
    assert not (tmp_path / "run" / "stage_01" / "leftover").exists()
    assert json.loads((tmp_path / "run" / "state.json").read_text())["finished"]


def test_a_changed_config_is_refused_and_named(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kill, "POINT", ("batch", 0, 2))
    with pytest.raises(kill.Killed):
        run(experiment(tmp_path / "run", "zero_shot=false"))
    with pytest.raises(ValueError, match=r"optim\.lr: 0\.01 -> 0\.02"):
        run(experiment(tmp_path / "run", "zero_shot=false", "optim.lr=0.02"))
    run(experiment(tmp_path / "run", "zero_shot=false", "trainer.log_every_n_steps=2"))


def test_overwrite_continues_an_interrupted_run_of_the_same_configuration(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run", "overwrite=true")
    monkeypatch.setattr(kill, "POINT", ("batch", 1, 6))
    with pytest.raises(kill.Killed):
        run(config)
    before = (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns == before
    assert_same_run(uninterrupted, tmp_path / "run")


def test_a_stage_whose_checkpoint_is_lost_is_done_again(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run")
    monkeypatch.setattr(kill, "POINT", ("batch", 2, 2))
    with pytest.raises(kill.Killed):
        run(config)
    (tmp_path / "run/stage_02/final.ckpt").unlink()
    run(config)
    left, right = adapters(uninterrupted), adapters(tmp_path / "run")
    for stage in left:
        assert all(torch.equal(value, right[stage][name]) for name, value in left[stage].items()), stage
    assert Results.load(uninterrupted).matrix.to_dict() == Results.load(tmp_path / "run").matrix.to_dict()


def test_a_checkpoint_of_another_stage_is_refused(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run")
    monkeypatch.setattr(kill, "POINT", ("batch", 1, 6))
    with pytest.raises(kill.Killed):
        run(config)
    (tmp_path / "run/stage_02/final.ckpt").write_bytes((tmp_path / "run/stage_01/final.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"stage_02/final\.ckpt: is of stage 'colours', not of 'shapes'.*delete it"):
        run(config)


@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_lost_results_are_refused_and_the_remedy_works(
    damage: str,
    experiment: Callable[..., ExperimentConfig],
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = experiment(tmp_path / "run")
    monkeypatch.setattr(kill, "POINT", ("batch", 2, 2))
    with pytest.raises(kill.Killed):
        run(config)
    results = tmp_path / "run/results.json"
    results.write_text("{") if damage == "damaged" else results.unlink()
    with pytest.raises(ValueError, match=r"results\.json.*Delete state\.json and results\.json"):
        run(config)
    results.unlink(missing_ok=True)
    (tmp_path / "run/state.json").unlink()
    trained = (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns
    run(config)
    assert (tmp_path / "run/stage_01/final.ckpt").stat().st_mtime_ns == trained
    assert Results.load(uninterrupted).matrix.to_dict() == Results.load(tmp_path / "run").matrix.to_dict()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("strategy.targets={language: [qq_proj]}", "'qq_proj' matches no linear"),
        ("trainer.precision=bf17", "bf17"),
        ("trainer.devices=two", "two"),
        ("trainer.accelerator=tpuu", "tpuu"),
        ("trainer.strategy=dpp", "dpp"),
        ("trainer.gradient_clip_val=abc", "abc"),
    ],
)
def test_a_wrong_value_shows_before_any_evaluation(
    override: str, message: str, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        run(experiment(tmp_path / "run", override))
    assert not (tmp_path / "run/predictions").exists()


def test_projector_only_training_accepts_text_only_batches(
    experiment: Callable[..., ExperimentConfig], smoke_root: Path, tmp_path: Path
) -> None:
    rows = json.loads((smoke_root / "colours/train.json").read_text())[:8]
    for row in rows:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "").strip()
    (tmp_path / "train.json").write_text(json.dumps(rows))
    overrides = ["order=[colours]", f"tasks.colours.train={tmp_path}/train.json", "strategy.targets={vision: [q_proj]}"]
    results = run(experiment(tmp_path / "run", *overrides, "zero_shot=false"))
    assert results.matrix.scores[0][0] is not None


def test_a_folder_with_other_files_is_refused(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"thesis\.tex.*out=DIR"):
        run(experiment(tmp_path, "overwrite=true"))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_second_run_in_the_same_directory_is_refused(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    config = experiment(tmp_path / "run")
    first = RunDirectory(config)
    with pytest.raises(ValueError, match="another process is running"):
        RunDirectory(config)
    first.close()
    RunDirectory(config).close()


def test_a_foreign_checkpoint_is_one_clear_error(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tmp_path / "run", "zero_shot=false")
    monkeypatch.setattr(kill, "POINT", ("batch", 0, 2))
    with pytest.raises(kill.Killed):
        run(config)
    last = tmp_path / "run" / "stage_01" / "last.ckpt"
    good = last.read_bytes()
    last.write_bytes((uninterrupted / "stage_01" / "final.ckpt").read_bytes())
    with pytest.raises(ValueError, match=r"belongs to run"):
        run(config)
    last.write_bytes(good)
    run(config)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "[]",
        "null",
        "{}",
        '{"run_id": 3}',
        '{"run_id": "x", "steps": [-1]}',
        '{"run_id": "x", "steps": "12"}',
        "\0",
    ],
)
def test_a_damaged_state_is_one_clear_error(
    text: str, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "state.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"state\.json: is damaged.*Delete state.json and results.json.*overwrite=true"
    ):
        run(experiment(tmp_path / "run"))


@pytest.mark.skipif(os.geteuid() == 0 and not Path("/proc/sys").is_dir(), reason="root may write anywhere")
def test_a_directory_that_cannot_be_written_is_one_clear_error(experiment: Callable[..., ExperimentConfig]) -> None:
    with pytest.raises(OSError, match=r"cannot write the run directory.*out=DIR"):
        run(experiment(Path("/proc/sys/mcit_run")))
