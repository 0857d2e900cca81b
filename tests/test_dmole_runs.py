"""Whole D-MoLE runs on the tiny model: nothing learnt earlier moves, killed and resumed is the same, ranks agree."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from dump import digest
from smoke_runs import assert_same_run, curves, predictions
from torch import Tensor

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run

TASKS = ["colours", "shapes", "counts"]
STRATEGY = "name: dmole, rank: 4, alpha: 8, dropout: 0.0, vision_floor: 0.25"
BOUNDARIES = (
    "{_target_: callbacks.GradientProbe}, {_target_: callbacks.CurriculumRatio}, {_target_: callbacks.BudgetReallocation},"
    " {_target_: callbacks.RouterSpawn}, {_target_: callbacks.StageCost}, {_target_: callbacks.BackwardTransfer}"
)
SMALL = ("data.limit_train=12", "data.limit_val=4", "data.limit_test=4", "tasks.shapes.epochs=2", "optim.lr=0.03")
Make = Callable[..., ExperimentConfig]


@pytest.fixture
def experiment(smoke_root: Path, tmp_path: Path) -> Make:
    def make(out: Path, *overrides: str, strategy: str = "") -> ExperimentConfig:
        fixed = (
            f"data.root={smoke_root}",
            "prepare=null",
            f"out={out}",
            f"strategy={{{STRATEGY}{strategy}}}",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            f"callbacks=[{BOUNDARIES}, {{_target_: kill.KillAt}}, {{_target_: dump.DumpRank, folder: {tmp_path / 'dump'}}},"
            " {_target_: callbacks.StageCheckpoint, every_n_steps: 1}]",
        )
        return load_config(experiments_dir() / "dmole_smoke.yaml", [*fixed, *SMALL, *overrides])

    return make


@pytest.fixture
def whole(experiment: Make, tmp_path: Path) -> Path:
    run(experiment(tmp_path / "whole"))
    return tmp_path / "whole"


def test_earlier_experts_and_routers_stay_bit_identical_and_the_plan_is_in_every_checkpoint(whole: Path) -> None:
    states: list[dict[str, Tensor]] = []
    for number, task in enumerate(TASKS, start=1):
        checkpoint = torch.load(whole / f"stage_{number:02d}/final.ckpt", weights_only=True)
        plans = checkpoint["mcit"]["structure"]
        assert [plan["stage"] for plan in plans] == TASKS[:number]
        state = checkpoint["state_dict"]
        assert not any("projector" in name or ".base." in name for name in state)
        for name, value in states[-1].items() if states else ():
            if ".lora_" in name:
                assert torch.equal(state[name], value), name
            elif name.startswith("strategy.bank."):
                assert torch.equal(state[name][: number - 1], value), name
        new = {f"model.{path}.lora_{part}.{task}" for path in plans[-1]["ranks"] for part in "ab"}
        assert new == {name for name in state if name.endswith(f".{task}")}
        assert sum(float(state[name].abs().sum()) for name in new if ".lora_b." in name) > 0
        states.append(state)


def test_the_base_stays_bit_identical(experiment: Make, whole: Path, tmp_path: Path) -> None:
    """All that is not an expert or an autoencoder, projector, norms and embeddings included."""
    model = load_backbone(experiment(whole).backbone).model
    pretrained = digest({f"model.{name}": value for name, value in model.state_dict().items()})
    for task in TASKS:
        assert json.loads((tmp_path / f"dump/rank0_{task}.json").read_text())["base"] == pretrained


def test_budget_ratio_and_cost_are_reported(whole: Path) -> None:
    results = Results.load(whole)
    assert list(results.allocation) == TASKS and results.routing is not None
    for task, row in zip(TASKS, results.cost, strict=True):
        decided = results.allocation[task]
        assert len(decided["ranks"]) == 8 and sum(decided["budget"].values()) == 8
        assert decided["budget"]["vision"] >= 2 and abs(sum(decided["ratios"].values()) - 1) < 1e-9
        assert len(decided["scores"]) == 16
        assert row.proxy_seconds and row.router_seconds and row.routing_seconds_per_sample
        assert row.first_routing_seconds_per_sample  # of the new task; the others are remembered
    tags = {name.partition(":")[2]: points for name, points in curves(whole).items()}
    assert [step for step, _ in tags["curriculum/vision"]] == [0, 3, 9]  # the first step of each stage
    shares = [value for _, value in tags["curriculum/vision"]]
    assert shares == pytest.approx([results.allocation[task]["ratios"]["vision"] for task in TASKS], rel=1e-5)


def test_unseen_tasks_are_judged_too_and_the_probe_may_take_several_passes(
    experiment: Make, whole: Path, tmp_path: Path
) -> None:
    run(experiment(tmp_path / "run", "evaluate=all", strategy=", proxy_passes: 2"))
    results, once = Results.load(tmp_path / "run"), Results.load(whole)
    assert results.routing is not None
    assert {stage: list(rates) for stage, rates in results.routing["rejected_per_stage"].items()} == dict.fromkeys(
        TASKS, TASKS
    )
    for task in TASKS:
        assert results.allocation[task]["ranks"] == once.allocation[task]["ranks"]
        assert results.allocation[task]["scores"] == pytest.approx(once.allocation[task]["scores"], rel=1e-4, abs=1e-7)
    first = [row.first_routing_seconds_per_sample for row in results.cost]
    assert first[0] and first[1:] == [None, None]  # every sample was looked at after the first stage


@pytest.mark.parametrize("co_expert", ["none", "best"])
def test_with_the_oracle_nothing_is_ever_forgotten(co_expert: str, experiment: Make, tmp_path: Path) -> None:
    run(experiment(tmp_path / "run", "optim.lr=0.3", strategy=f", router: oracle, co_expert: {co_expert}"))
    results = Results.load(tmp_path / "run")
    assert results.summary["BWT"] == 0.0
    answers = {
        name: [json.loads(line)["text"] for line in text.splitlines()]
        for name, text in predictions(tmp_path / "run").items()
    }
    for number, task in enumerate(TASKS, start=1):
        first = answers[f"predictions/stage_{number:02d}/{task}.jsonl"]
        assert first == answers[f"predictions/stage_03/{task}.jsonl"]
        assert first != answers[f"predictions/zero_shot/{task}.jsonl"]  # the experts do something


def test_killed_and_resumed_equals_uninterrupted(
    experiment: Make, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kill

    config = experiment(tmp_path / "run")
    spent = {}
    for point in (("batch", 0, 1), ("batch", 1, 4), ("end", 1), ("batch", 2, 1), ("test", 2, 1)):
        monkeypatch.setattr(kill, "POINT", point)
        with pytest.raises(kill.Killed):
            run(config)
        row = Results.load(tmp_path / "run").cost[-1]  # of the stage that was killed, in the middle of its training
        assert row.proxy_seconds and row.router_seconds
        times = spent.setdefault(row.stage, (row.proxy_seconds, row.router_seconds))
        assert times == (row.proxy_seconds, row.router_seconds)
    run(config)
    assert {row.stage: (row.proxy_seconds, row.router_seconds) for row in Results.load(tmp_path / "run").cost} == spent
    assert_same_run(whole, tmp_path / "run")
    assert Results.load(whole).allocation == Results.load(tmp_path / "run").allocation


def test_callbacks_that_are_missing_or_in_the_wrong_order_are_named(experiment: Make, tmp_path: Path) -> None:
    rest = (
        "{_target_: callbacks.StageCost}, {_target_: callbacks.BackwardTransfer}, {_target_: callbacks.StageCheckpoint}"
    )
    with pytest.raises(ValueError, match=r"needs \{_target_: callbacks\.GradientProbe\}"):
        experiment(tmp_path / "run", f"callbacks=[{rest}]")
    order = "{_target_: callbacks.CurriculumRatio}, {_target_: callbacks.GradientProbe}, {_target_: callbacks.BudgetReallocation}"
    config = experiment(
        tmp_path / "run", f"callbacks=[{order}, {{_target_: callbacks.RouterSpawn}}, {rest}]", "zero_shot=false"
    )
    with pytest.raises(ValueError, match=r"list callbacks\.GradientProbe before it"):
        run(config)
    config = experiment(
        tmp_path / "other", "strategy={name: sequential}", f"callbacks=[{{_target_: callbacks.GradientProbe}}, {rest}]"
    )
    with pytest.raises(ValueError, match="strategy 'sequential' has no use for it"):
        run(config)


def test_two_processes_decide_as_one(experiment: Make, smoke_root: Path, tmp_path: Path) -> None:
    """Scores, plans, autoencoders and experts are the same on both ranks; scores and plans equal a single process's."""
    watch = f"{{_target_: dump.DumpRank, folder: {tmp_path / 'dump'}}}"
    dump = f"callbacks=[{BOUNDARIES}, {watch}, {{_target_: callbacks.StageCheckpoint}}]"
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)]), "OMP_NUM_THREADS": "1"}
    overrides = [
        f"data.root={smoke_root}",
        "prepare=null",
        f"out={tmp_path / 'two'}",
        f"strategy={{{STRATEGY}}}",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        "trainer.enable_progress_bar=false",
        "data.batch_size=2",
        dump,
        *SMALL,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "mcit_lightning", "dmole_smoke", *overrides],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for task in TASKS:
        one, two = (json.loads((tmp_path / f"dump/rank{rank}_{task}.json").read_text()) for rank in (0, 1))
        assert one == two
    run(experiment(tmp_path / "one"))
    for task in TASKS:
        alone, pair = (Results.load(tmp_path / name).allocation[task] for name in ("one", "two"))
        assert alone["ranks"] == pair["ranks"] and alone["budget"] == pair["budget"]
        assert alone["scores"] == pytest.approx(pair["scores"], rel=1e-4, abs=1e-7)
    states = [
        torch.load(tmp_path / name / "stage_01/final.ckpt", weights_only=True)["state_dict"] for name in ("one", "two")
    ]
    for name in states[0]:
        if name.startswith("strategy.bank."):
            torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-2, atol=1e-3)
