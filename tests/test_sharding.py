"""FSDP2: what is spread over the processes and what is not. One process is a group too; two are in the last tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from dmole_model import evaluation_batches, learn
from processes import STRICT, free_port, start_ranks, wait_for
from smoke_runs import small_experiment
from test_distributed import TASKS, command, dumps, finish
from test_engines import weights
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoConfig

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.dry_run import plan
from mcit_lightning.generation import generate_answers
from mcit_lightning.probe import gradient_scores
from mcit_lightning.runner import run
from mcit_lightning.sharding import average_gradients, lockstep, most_rounds, shard_decoder

DMOLE = {"name": "dmole", "rank": 2, "dropout": 0.0}


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())})
    dist.init_process_group("gloo", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def shard(module: Any) -> None:
    shard_decoder(module.towers, init_device_mesh("cpu", (1,)))


def test_only_frozen_weights_of_decoder_layers_are_sharded(
    smoke_config: Callable[..., ExperimentConfig], group: None
) -> None:
    module, strategy, _ = learn(smoke_config(strategy=DMOLE), 1)
    shard(module)
    shard(module)  # Lightning asks before every fit and test
    path = next(path for path in strategy.candidates(module.towers)["language"])
    layer = module.towers.attach(path, scale=1.0)
    layer.add_branch("later", 2, seed=0, path=path)
    sharded = {name for name, value in module.named_parameters() if isinstance(value, DTensor)}
    decoder = {f"model.{module.towers.language}.layers.{index}." for index in range(2)}
    expected = {name for name, _ in module.named_parameters() if name.startswith(tuple(decoder)) and "lora" not in name}
    assert sharded == expected and len(sharded) == 2 * 9
    assert not sharded & module.saved_keys()
    with pytest.raises(ValueError, match="spread over processes"):
        layer.merge()


def test_answers_and_probe_of_a_sharded_model_are_those_of_the_whole_one(
    smoke_config: Callable[..., ExperimentConfig], group: None
) -> None:
    found = []
    for sharded in (False, True):
        module, strategy, stream = learn(smoke_config(strategy=DMOLE), 2)
        if sharded:
            shard(module)
        answers = []
        for batch in evaluation_batches(stream):
            with strategy.routing(module.towers, batch, None):
                end = stream.train_collator.encoder.end_id
                inputs = batch["inputs"]
                answers.append(generate_answers(module.model, module.processor, inputs, 4, end, lockstep=sharded))
        paths = [path for own in strategy.candidates(module.towers).values() for path in own]
        found.append((answers, gradient_scores(module.towers, paths, stream.probe_loader(8), 8)))
        assert all(parameter.grad is None for parameter in module.parameters())
    (whole, scores), (answers, sharded_scores) = found
    assert answers == whole
    assert sharded_scores == pytest.approx(scores, rel=1e-5) and min(scores.values()) >= 0 < max(scores.values())


def test_without_sharding_nothing_waits_for_other_processes(smoke_config: Callable[..., ExperimentConfig]) -> None:
    towers = learn(smoke_config(strategy=DMOLE), 1)[0].towers
    assert list(lockstep("abc", towers)) == [("a", True), ("b", True), ("c", True)]
    assert most_rounds(3, towers) == 3
    assert towers.any_process(True) and not towers.any_process(False)


def test_a_model_without_a_list_of_layers_is_refused(
    smoke_config: Callable[..., ExperimentConfig], group: None
) -> None:
    module = learn(smoke_config(strategy=DMOLE), 1)[0]
    module.towers.language = module.towers.vision + ".embeddings"
    with pytest.raises(ValueError, match=r"fsdp2 finds no list of layers in CLIPVisionEmbeddings; use ddp"):
        shard(module)


def test_a_plan_counts_a_devices_share_and_two_whole_layers(
    smoke_root: Path, tmp_path: Path, smoke_config: Callable[..., ExperimentConfig]
) -> None:
    deep = AutoConfig.from_pretrained(smoke_root / "model")
    deep.text_config.num_hidden_layers = 10
    deep.save_pretrained(tmp_path)
    base = {}
    for engine in ("ddp", "fsdp2"):
        trainer = {"accelerator": "cpu", "precision": "32-true", "devices": 4, "strategy": engine}
        memory = plan(smoke_config(backbone={"id": str(tmp_path)}, trainer=trainer)).memory
        assert memory is not None
        base[engine] = memory.base
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 2 * 32
    assert base["ddp"] - base["fsdp2"] == 4 * (10 * layer - 10 * layer // 4 - 2 * layer)


class Inspect(L.Callback):
    """Raises on a rank that does not hold its half of the decoder, or whose adapters are not those of the other."""

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        halves = [value for value in pl_module.parameters() if isinstance(value, DTensor)]
        assert len(halves) == 2 * 9 and all(2 * value.to_local().numel() == value.numel() for value in halves)
        for name, value in pl_module.named_parameters():
            if name in pl_module.saved_keys():
                ranks = trainer.strategy.all_gather(value.detach())
                assert not isinstance(value, DTensor) and torch.equal(ranks[0], ranks[1]), name


def run_two(data: str, out: str) -> None:
    """A run that is inspected; in a process of its own, one per rank."""
    nodes = ["Consolidate", "StageCost", "BackwardTransfer", "StageCheckpoint"]
    callbacks = ", ".join(f"{{_target_: callbacks.{node}}}" for node in nodes)
    overrides = [
        "trainer.devices=2",
        "trainer.strategy=fsdp2",
        "zero_shot=false",
        "order=[colours]",
        "data.batch_size=2",
        "data.limit_test=5",
        f"callbacks=[{{_target_: {__name__}.Inspect}}, {callbacks}]",
    ]
    run(small_experiment(Path(data), Path(out), *overrides))


def test_each_of_two_processes_holds_half_of_the_decoder(smoke_root: Path, tmp_path: Path) -> None:
    code = f"import {__name__} as test; test.run_two({str(smoke_root)!r}, {str(tmp_path / 'run')!r})"
    wait_for(start_ranks(code, 2, tmp_path, **STRICT), 600)
    assert len((tmp_path / "run/predictions/stage_01/colours.jsonl").read_text().splitlines()) == 5


def average(folder: str) -> None:
    """Average gradients of which some are on one rank, on both or on none."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    parameters.append(nn.Parameter(torch.zeros(2, dtype=torch.bfloat16)))
    parameters[0].grad = torch.tensor([1.0, 2.0]) * (rank + 1)
    if rank == 1:
        parameters[1].grad = torch.tensor([4.0, 0.0])
    parameters[3].grad = torch.full((2,), float(rank))
    parameters[4].grad = torch.full((2,), 2.0 * rank, dtype=torch.bfloat16)
    average_gradients(parameters, find_unused=True)
    torch.save([parameter.grad for parameter in parameters], f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_gradients_are_averaged_and_those_of_no_rank_stay_away(tmp_path: Path) -> None:
    wait_for(start_ranks(f"import {__name__} as test; test.average({str(tmp_path)!r})", 2, tmp_path, **STRICT), 600)
    for rank in (0, 1):
        first, second, third, fourth, fifth = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert first.tolist() == [1.5, 3.0] and second.tolist() == [2.0, 0.0]
        assert third is None and fourth.tolist() == [0.5, 0.5]
        assert fifth.dtype == torch.bfloat16 and fifth.tolist() == [1.0, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("then", ["fsdp2", "ddp"])
def test_killed_on_two_processes_and_resumed_on_either_engine(smoke_root: Path, tmp_path: Path, then: str) -> None:
    settings = ("trainer.devices=2", "data.batch_size=2", "data.limit_train=12")
    finish(command(smoke_root, tmp_path / "whole", *settings, "trainer.strategy=fsdp2"))
    process = command(smoke_root, tmp_path / "run", *settings, "trainer.strategy=fsdp2")
    while not (tmp_path / "run/stage_02/last.ckpt").exists() and process.poll() is None:
        pass
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), 9)
    process.kill()
    process.communicate()
    assert not (tmp_path / "run/stage_03").exists()
    finish(command(smoke_root, tmp_path / "run", *settings, f"trainer.strategy={then}"))
    whole, resumed = weights(tmp_path / "whole"), weights(tmp_path / "run")
    assert whole.keys() == resumed.keys()
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0 if then == "fsdp2" else 1e-5, msg=name)
    assert set(dumps(tmp_path / "dump_run")) >= set(TASKS)
