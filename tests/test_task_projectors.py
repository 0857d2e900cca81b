"""A projector per task: every sample goes through its own task's, whatever else is in the batch."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_branchlora import BRANCH, STAGES, batches, build, last_logits, merge, rows
from test_branchlora_options import final, short

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run
from mcit_lightning.validation import build_strategy

Make = Callable[..., ExperimentConfig]
OWN = "strategy.projector=per_task"


@pytest.fixture
def experiment(smoke_root: Path) -> Make:
    def make(*overrides: str) -> ExperimentConfig:
        return load_config(
            experiments_dir() / "branchlora_smoke.yaml", [f"data.root={smoke_root}", "prepare=null", *overrides]
        )

    return make


def projector(module: Any) -> list[torch.nn.Parameter]:
    return [p for path in module.towers.projector for p in module.model.get_submodule(path).parameters()]


def test_each_sample_goes_through_its_tasks_projector(experiment: Make) -> None:
    """Against the model with that task's projector put into it by hand."""
    module = build(experiment(BRANCH, OWN, "strategy.selector=oracle"), [], std=0.3)
    states = []
    for number, stage in enumerate(STAGES):
        module.grow(module.strategy.plan(stage, module.towers))
        torch.manual_seed(number)
        for parameter in projector(module):  # what training would do
            torch.nn.init.normal_(parameter, std=0.3)
        states.append([parameter.detach().clone() for parameter in projector(module)])
    strategy: Any = module.strategy
    assert list(strategy.projectors.kept) == ["colours", "shapes"]
    batch = merge(
        [rows(part, [0, 1]) for part in batches(module.config, module)], module.processor.tokenizer.pad_token_id
    )
    together = last_logits(module, batch)
    kept, strategy.projectors = strategy.projectors, None
    kept.choose(None)
    for number, state in enumerate(states):
        for parameter, value in zip(projector(module), state, strict=True):
            parameter.data.copy_(value)
        own = last_logits(module, batch)
        for row in range(6):
            same = torch.allclose(own[row], together[row], rtol=1e-4, atol=1e-5)
            assert same == (row // 2 == number), (row, number)


def test_a_run_keeps_them_and_a_resumed_one_has_them(
    experiment: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import kill

    callbacks = (
        "callbacks=[{_target_: callbacks.RouterSpawn}, {_target_: callbacks.BranchFreeze}, {_target_: callbacks.StageCost},"
        " {_target_: callbacks.BackwardTransfer}, {_target_: kill.KillAt},"
        " {_target_: callbacks.StageCheckpoint, every_n_steps: 1}]"
    )
    run(experiment(BRANCH, OWN, f"out={tmp_path / 'whole'}", *short(callbacks)))
    first, second = (final(tmp_path / "whole", stage) for stage in (1, 2))
    live = [name for name in first if "multi_modal_projector" in name and not name.startswith("strategy.")]
    assert live and not any("projectors" in name for name in first)
    for name in live:
        kept = f"strategy.projectors.kept.colours.{name.removeprefix('model.').replace('.', '/')}"
        assert torch.equal(second[kept], first[name]) and not torch.equal(second[name], first[name])
    config = experiment(BRANCH, OWN, f"out={tmp_path / 'run'}", *short(callbacks))
    for point in (("batch", 1, 1), ("test", 1, 0)):
        monkeypatch.setattr(kill, "POINT", point)
        with pytest.raises(kill.Killed):
            run(config)
    run(config)
    again = final(tmp_path / "run", 2)
    assert again.keys() == second.keys() and all(torch.equal(again[name], second[name]) for name in second)
    answers = [(tmp_path / folder / "predictions/stage_02/colours.jsonl").read_text() for folder in ("whole", "run")]
    assert len(answers[0].splitlines()) == len(answers[1].splitlines()) == 4


def test_one_router_cannot_have_them_and_they_are_not_merged(experiment: Make) -> None:
    with pytest.raises(ValueError, match="projector: 'per_task' needs task_routers"):
        build_strategy({"name": "branchlora", "projector": "per_task", "task_routers": False})
    module = build(experiment(BRANCH, OWN), STAGES)
    strategy: Any = module.strategy
    with pytest.raises(ValueError, match="projector: 'per_task' keeps"):  # noqa: SIM117
        with strategy.merged(module.towers, batches(module.config, module)[0], "shapes"):
            pass
