"""What every registered strategy must keep, whatever its method: a new one is tested by being registered.

Strategies outside of the package take part too: `MCIT_STRATEGIES="my_file other_file"` names modules to import first.
"""

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import kill
import pytest
import torch
import watch
from dmole_model import merge, routed_logits, rows
from smoke_runs import adapters, predictions, small_experiment
from test_distributed import command, dumps, finish

from mcit_lightning.backbone import load_backbone
from mcit_lightning.checkpoints import read_checkpoint
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.module import MCITModule
from mcit_lightning.runner import run
from mcit_lightning.strategies import STRATEGIES, ContinualStrategy, DMoLE
from mcit_lightning.validation import build_strategy

TASKS = ["colours", "shapes"]
MODULES = os.environ.get("MCIT_STRATEGIES", "").split()
for module in MODULES:
    import_module(module)
NAMES = sorted(STRATEGIES)
TRAINING = [name for name in NAMES if STRATEGIES.get(name).stages(TASKS)]


def callbacks(name: str, *more: str) -> str:
    """What the strategy asks for, and what every run has."""
    needed = [f"callbacks.{callback}" for callback in build_strategy({"name": name}).required_callbacks()]
    usual = ["callbacks.Consolidate", "callbacks.StageCost", "callbacks.BackwardTransfer"]
    targets = [*needed, *(target for target in usual if target not in needed), *more]
    nodes = [f"{{_target_: {target}}}" for target in targets]
    return f"callbacks=[{', '.join(nodes)}, {{_target_: callbacks.StageCheckpoint, every_n_steps: 1}}]"


def settings(name: str, *more: str) -> list[str]:
    """Two tasks, two steps each; no dropout, which a resumed run draws anew."""
    dropout = ", dropout: 0.0" if hasattr(STRATEGIES.get(name).Config, "dropout") else ""
    return [
        f"imports=[{','.join(MODULES)}]",
        f"order=[{','.join(TASKS)}]",
        f"strategy={{name: {name}{dropout}}}",
        "data.limit_train=8",
        "data.limit_val=null",
        "tasks.colours.val=null",
        "tasks.shapes.val=null",
        "data.limit_test=2",
        "tasks.colours.epochs=1",
        "tasks.shapes.epochs=1",
        "zero_shot=false",
        callbacks(name, *more),
    ]


@dataclass
class Run:
    """A finished run."""

    config: ExperimentConfig
    root: Path
    seen: watch.Seen

    def fresh(self) -> MCITModule:
        """The module before any stage."""
        strategy = build_strategy(self.config.strategy)
        return MCITModule(load_backbone(self.config.backbone), strategy, self.config)

    def checkpoint(self, stage: int) -> dict[str, Any]:
        return read_checkpoint(self.root / f"stage_{stage:02d}" / "final.ckpt")

    def batches(self, module: MCITModule) -> list[dict[str, Any]]:
        """An evaluation batch of every task."""
        stages = module.strategy.stages(TASKS)
        stream = ContinualDataModule(self.config, module.processor, stages)
        stream.train_collator.reader = getattr(module.strategy, "sample_reader", lambda: None)()
        stream.evaluate_only(TASKS)
        return [next(iter(loader)) for loader in stream.test_dataloader()]


@pytest.fixture(scope="module")
def finished(smoke_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Run]:
    """`finished(name)`: an uninterrupted run of a strategy, made once."""
    runs: dict[str, Run] = {}

    def make(name: str) -> Run:
        if name not in runs:
            root = tmp_path_factory.mktemp("strategies") / name
            seen = watch.new()
            config = small_experiment(smoke_root, root, *settings(name, "watch.Watch", "kill.KillAt"))
            run(config)
            runs[name] = Run(config, root, seen)
        return runs[name]

    return make


@pytest.mark.parametrize("name", TRAINING)
def test_every_stage_trains_and_its_loss_is_finite(name: str, finished: Callable[[str], Run]) -> None:
    done = finished(name)
    stages = build_strategy(done.config.strategy).stages(TASKS)
    assert list(done.seen.trained) == [stage.name for stage in stages]
    for number, stage in enumerate(stages, start=1):
        assert done.seen.trained[stage.name] and done.seen.losses[stage.name]
        assert all(math.isfinite(loss) for loss in done.seen.losses[stage.name])
        after, before = done.checkpoint(number)["state_dict"], done.seen.before[stage.name]
        assert before.keys() <= after.keys(), "what trains is saved"
        assert any(not torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", TRAINING)
def test_the_base_stays_bit_identical(name: str, finished: Callable[[str], Run]) -> None:
    done = finished(name)
    module, fresh = done.seen.module, done.fresh()
    saved = module.saved_keys()
    now = {
        key.replace(".base.", ".").replace("vision_tower.tower.", "vision_tower."): value
        for key, value in module.model.state_dict().items()
        if f"model.{key}" not in saved
    }
    then = fresh.model.state_dict()
    assert {f"model.{key}" for key in then if key not in now} <= saved  # a tuned projector
    assert all(torch.equal(value, then[key]) for key, value in now.items())


@pytest.mark.parametrize("name", TRAINING)
def test_what_no_longer_trains_does_not_move(name: str, finished: Callable[[str], Run]) -> None:
    """Neither by the optimizer nor by the end of a task: the experts of earlier tasks are a promise."""
    done = finished(name)
    stages = build_strategy(done.config.strategy).stages(TASKS)
    for number, stage in enumerate(stages[1:], start=2):
        if stage.reset:
            continue
        earlier, after = done.checkpoint(number - 1)["state_dict"], done.checkpoint(number)["state_dict"]
        once = set.union(*(done.seen.trained[before.name] for before in stages[: number - 1]))
        for key in once - done.seen.trained[stage.name]:
            assert torch.equal(earlier[key], after[key]), key


@pytest.mark.parametrize("name", TRAINING)
def test_a_checkpoint_replayed_on_a_fresh_backbone_gives_the_same_logits(
    name: str, finished: Callable[[str], Run]
) -> None:
    done = finished(name)
    checkpoint = done.checkpoint(len(done.seen.trained))
    log = checkpoint["mcit"]["structure"]
    assert json.loads(json.dumps(log)) == log
    module, fresh = done.seen.module.eval(), done.fresh()
    batches = done.batches(module)
    pretrained = [routed_logits(fresh.eval(), batch) for batch in batches]
    fresh.run_id = module.run_id
    fresh.load_weights(checkpoint)
    trained = [routed_logits(module, batch) for batch in batches]
    restored = [routed_logits(fresh.eval(), batch) for batch in batches]
    assert all(map(torch.equal, trained, restored))
    assert not all(map(torch.equal, trained, pretrained))


@pytest.mark.parametrize("name", NAMES)
def test_a_sample_is_answered_without_its_task_and_without_company(name: str, finished: Callable[[str], Run]) -> None:
    """Logits do not depend on the task id, on the rest of the batch, or on padding."""
    done = finished(name)
    module = done.seen.module.eval() if done.seen.module is not None else done.fresh().eval()
    batches = done.batches(module)
    pad = module.processor.tokenizer.pad_token_id
    together = merge([rows(batch, [0, 1]) for batch in batches], pad, extra=3)
    together["task"] = ["unknown"] * 4
    logits = routed_logits(module, together)
    for row in range(4):
        alone = rows(batches[row // 2], [row % 2])
        torch.testing.assert_close(routed_logits(module, alone)[0], logits[row], rtol=1e-4, atol=1e-5)
        routed = module.strategy.routed_to()
        assert routed is None or (len(routed) == 1 and set(routed[0]) <= set(TASKS))


@pytest.mark.parametrize("name", TRAINING)
def test_what_a_strategy_needs_at_task_boundaries_is_asked_for(name: str) -> None:
    strategy = build_strategy({"name": name})
    if type(strategy).end_task is not ContinualStrategy.end_task or strategy.review_samples(100):
        assert "Consolidate" in strategy.required_callbacks()
    if type(strategy).begin_task is not ContinualStrategy.begin_task or strategy.preview_samples(100):
        assert "TaskPreview" in strategy.required_callbacks()


@pytest.mark.parametrize("name", TRAINING)
def test_plan_decides_and_grow_can_be_repeated(name: str, finished: Callable[[str], Run]) -> None:
    """`plan` has no side effects, and `grow` builds a thing once."""
    module = finished(name).fresh()
    for stage in module.strategy.stages(TASKS):
        before = set(module.state_dict())
        if isinstance(module.strategy, DMoLE):  # what the gradient probe would have found
            found = module.strategy.candidates(module.towers).values()
            module.strategy.scores = {path: 1.0 for paths in found for path in paths}
        plan = module.strategy.plan(stage, module.towers)
        assert plan == module.strategy.plan(stage, module.towers)
        assert set(module.state_dict()) == before
        module.grow(plan)
        keys = set(module.state_dict())
        module.strategy.grow(module.towers, plan)
        assert set(module.state_dict()) == keys
        assert list(module.strategy.trainable(module.towers, stage))


@pytest.mark.parametrize("name", TRAINING)
def test_killed_and_resumed_it_ends_bit_identical(
    name: str, finished: Callable[[str], Run], smoke_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last stage's end-of-task work, so its last step is done again: all that a strategy keeps is in the checkpoint."""
    done = finished(name)
    config = small_experiment(smoke_root, tmp_path / "run", *settings(name, "watch.Watch", "kill.KillAt"))
    watch.new()
    monkeypatch.setattr(kill, "POINT", ("end", len(done.seen.trained) - 1))
    with pytest.raises(kill.Killed):
        run(config)
    run(config)
    whole, again = adapters(done.root), adapters(tmp_path / "run")
    assert whole.keys() == again.keys()
    for stage, state in whole.items():
        assert state.keys() == again[stage].keys()
        for key, value in state.items():
            assert torch.equal(value, again[stage][key]), (stage, key)
    assert predictions(done.root) == predictions(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINING)
def test_two_processes_agree(name: str, smoke_root: Path, tmp_path: Path) -> None:
    dump = f"{{_target_: dump.DumpRank, folder: {tmp_path / 'dump'}}}"
    usual = callbacks(name, "watch.Watch").replace("{_target_: watch.Watch}", dump)
    own = [value for value in settings(name) if not value.startswith("callbacks=")]
    finish(command(smoke_root, tmp_path / "run", *own, usual, "trainer.devices=2", "data.batch_size=2"))
    for stage, by_rank in dumps(tmp_path / "dump").items():
        assert set(by_rank) == {0, 1}
        assert stage.startswith("test_") or by_rank[0] == by_rank[1], stage
