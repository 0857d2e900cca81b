"""DeepSpeed's ZeRO-2, with its CPU accelerator and two gloo processes. What needs the package is skipped without it."""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import kill
import lightning as L
import pytest
import torch
from processes import TESTS, free_port, start, start_ranks, wait_for
from smoke_runs import small_experiment
from test_engines import TASKS, TOLERANCE, drop_images, rows, structure, weights, work

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run
from mcit_lightning.zero import ZERO2

NAMES = ("sequential", "branchlora", "dmole", "ewc")
"""One set of weights; routers and counts; growth and a probe; gradients after the training."""


class ZeroGaps(L.Callback):
    """What ZeRO does to a parameter without a gradient, for the other engines: it steps with a gradient of zero."""

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)


def with_gaps(data: str, out: str, engine: str, *, filled: bool = False) -> ExperimentConfig:
    """The task in which half of the rows have no image, sorted by length: the projector has no gradient in some of the steps."""
    config = accumulating(data, out, engine, f"order=[{TASKS[1]}]")
    if filled:
        config.callbacks.append({"_target_": f"{__name__}.ZeroGaps"})
    return config


def accumulating(data: str, out: str, engine: str, *overrides: str) -> ExperimentConfig:
    """Steps of two micro-batches, an epoch's last one of a single one; a checkpoint every second step."""
    return small_experiment(
        Path(data),
        Path(out),
        "order=[colours]",  # all rows have an image: every parameter gets a gradient in every step
        "zero_shot=false",
        "trainer.devices=2",
        f"trainer.strategy={engine}",
        "trainer.accumulate_grad_batches=2",
        "data.batch_size=2",
        "data.limit_train=20",
        "optim.lr=1e-3",
        "optim.projector_lr=1e-3",
        *overrides,
    )


def train(data: str, root: str) -> None:
    """Whole runs, and one that is killed; in a process of its own, one per rank."""
    work(data, f"{root}/2", 2, ZERO2, NAMES)
    run(with_gaps(data, f"{root}/gaps", ZERO2))
    run(with_gaps(data, f"{root}/gaps_filled", "ddp", filled=True))
    run(with_gaps(data, f"{root}/gaps_skipped", "ddp"))
    run(accumulating(data, f"{root}/whole", ZERO2))
    kill.POINT = ("batch", 0, 4)
    try:
        run(accumulating(data, f"{root}/resumed", ZERO2))
    except kill.Killed:
        os._exit(0)


def go_on(data: str, root: str) -> None:
    """Continue what was killed, on both engines; in a process of its own, one per rank."""
    run(accumulating(data, f"{root}/resumed", ZERO2))
    run(accumulating(data, f"{root}/resumed_on_ddp", "ddp"))
    run(accumulating(data, f"{root}/ddp", "ddp"))


def deepspeed_variables() -> dict[str, str]:
    """What a process of its own needs for DeepSpeed on a CPU. Skips the test where the package is missing."""
    pytest.importorskip("deepspeed")
    paths = [str(TESTS), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def runs(smoke_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with all runs. Half of the rows of the second task have no image."""
    variables = deepspeed_variables()
    root = tmp_path_factory.mktemp("zero")
    data = root / "data"
    shutil.copytree(smoke_root, data)
    for split in ("train", "val", "test"):
        drop_images(data / TASKS[1] / f"{split}.json")
    work(str(data), str(root / "1"), 1, "auto", NAMES)
    for step in ("train", "go_on"):
        code = f"import {__name__} as test; test.{step}({str(data)!r}, {str(root)!r})"
        wait_for(start_ranks(code, 2, root, **variables), 900)
        if step == "train":
            shutil.copytree(root / "resumed", root / "resumed_on_ddp")
            saved = torch.load(root / "resumed/stage_01/last.ckpt", weights_only=True)
            assert saved["global_step"] == 2 and not (root / "resumed/stage_01/final.ckpt").exists()
    return root


@pytest.mark.slow
@pytest.mark.parametrize("strategy", NAMES)
def test_it_learns_what_one_process_learns(runs: Path, strategy: str) -> None:
    one, two = runs / "1/auto" / strategy, runs / "2" / ZERO2 / strategy
    assert structure(one) == structure(two)
    assert_close(two, one)
    files = sorted(path.relative_to(one) for path in one.glob("predictions/**/*.jsonl"))
    assert len(files) >= 2
    for file in files:
        assert sorted(str(row["index"]) for row in rows(two / file)) == sorted(
            str(row["index"]) for row in rows(one / file)
        )


@pytest.mark.slow
def test_incomplete_windows_of_accumulation_are_those_of_ddp(runs: Path) -> None:
    assert_close(runs / "whole", runs / "ddp")


@pytest.mark.slow
def test_a_parameter_without_a_gradient_steps_with_zero(runs: Path) -> None:
    assert_close(runs / "gaps", runs / "gaps_filled")
    filled, skipped = weights(runs / "gaps_filled"), weights(runs / "gaps_skipped")
    assert max(float((filled[name] - skipped[name]).abs().max()) for name in filled) > 10 * TOLERANCE


@pytest.mark.slow
def test_a_killed_stage_goes_on_bit_for_bit(runs: Path) -> None:
    assert_close(runs / "resumed", runs / "whole", tolerance=0.0)


@pytest.mark.slow
def test_a_killed_stage_goes_on_under_ddp(runs: Path) -> None:
    assert_close(runs / "resumed_on_ddp", runs / "ddp")


@pytest.mark.slow
def test_torchrun_starts_it_with_the_command_line(smoke_root: Path, tmp_path: Path) -> None:
    variables = deepspeed_variables()
    for engine in (ZERO2, "ddp"):
        settings = [f"data.root={smoke_root}", "prepare=null", f"out={tmp_path / engine}", "trainer.accelerator=cpu"]
        settings += ["trainer.devices=2", f"trainer.strategy={engine}"]
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
        wait_for([start([*launch, "-m", "mcit_lightning", "dmole_smoke", *settings], tmp_path, **variables)], 900)
    assert structure(tmp_path / ZERO2) == structure(tmp_path / "ddp")
    assert_close(tmp_path / ZERO2, tmp_path / "ddp")


def assert_close(found: Path, expected: Path, tolerance: float = TOLERANCE) -> None:
    left, right = weights(found), weights(expected)
    assert left.keys() == right.keys() and len(left) > 20
    for name, value in right.items():
        torch.testing.assert_close(left[name], value, rtol=0, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("trainer.gradient_clip_algorithm=value", ["gradient_clip_algorithm", "norm", "ddp"]),
        ("trainer.precision=bf16-true", ["trainer.precision", "bf16-true", "bf16-mixed"]),
        ("backbone.compile=inductor", ["backbone.compile", ZERO2]),
    ],
)
def test_what_it_cannot_do_is_refused(override: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(experiments_dir() / "smoke.yaml", [f"trainer.strategy={ZERO2}", "dry_run=true", override])
    assert all(word in str(error.value) for word in words)


@pytest.mark.skipif(find_spec("deepspeed") is not None, reason="deepspeed is installed")
def test_without_the_package_it_is_refused() -> None:
    with pytest.raises(ValueError, match=f"'{ZERO2}' needs DeepSpeed.*pip install"):
        load_config(experiments_dir() / "smoke.yaml", [f"trainer.strategy={ZERO2}"])
