"""Compiled layers compute what the others do, also after the model has grown; what cannot be compiled is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from smoke_runs import adapters, curves

from mcit_lightning.backbone import load_backbone
from mcit_lightning.compilation import compile_decoder, cpp_compiler, decoder_layers
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.loss import answer_loss
from mcit_lightning.runner import run
from mcit_lightning.stages import sequential_stages

TOLERANCE = 1e-5
"""Largest difference of a weight, where Adam can move each by 1e-3 in a step and takes four."""


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_loss_and_gradients_agree_after_growth(backend: str, smoke_config: Callable[..., ExperimentConfig]) -> None:
    config = smoke_config()
    backbone = load_backbone(config.backbone)
    stream = ContinualDataModule(config, backbone.processor, sequential_stages(config.order))
    batches = [batch for _, batch in zip(range(2), stream.train_dataloader(), strict=False)]
    paths = list(backbone.towers.targets("language", ["q_proj", "down_proj"]))
    for growth in range(2):
        torch.manual_seed(growth)
        for path in paths:
            layer = backbone.towers.attach(path, scale=2.0)
            layer.add_branch(f"branch{growth}", 2, seed=0, path=path)
            torch.nn.init.normal_(layer.lora_b[f"branch{growth}"], std=0.1)
        weight = backbone.towers.adapters[paths[0]].lora_b[f"branch{growth}"]
        results = []
        for stance in ("force_eager", "default"):
            compile_decoder(backbone.towers, backend)
            with torch.compiler.set_stance(stance):
                for batch in batches:  # of two lengths
                    weight.grad = None
                    loss = answer_loss(backbone.model, batch).loss
                    loss.backward()
                    assert weight.grad is not None
                    results.append((loss.detach(), weight.grad.clone()))
        for (loss, grad), (other_loss, other_grad) in zip(results[:2], results[2:], strict=True):
            torch.testing.assert_close(loss, other_loss)
            torch.testing.assert_close(grad, other_grad)
    assert len(decoder_layers(backbone.towers)) == 2


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("backbone.compile=fast", "backbone.compile: no backend 'fast'. Known: .*inductor"),
        ("strategy={name: moelora}", "backbone.compile: strategy 'moelora' decides in Python"),
    ],
)
def test_what_cannot_be_compiled_is_refused(
    override: str, message: str, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        experiment(tmp_path / "run", "backbone.compile=inductor", override)


def test_without_a_compiler_inductor_is_refused_on_a_cpu(
    experiment: Callable[..., ExperimentConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ValueError, match=r"backbone\.compile: 'inductor' needs a C\+\+ compiler.*'no-such-compiler'.*CXX"
    ):
        experiment(tmp_path / "run", "backbone.compile=inductor")
    experiment(tmp_path / "run", "backbone.compile=aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_run_over_a_stage_boundary_learns_what_it_learns_without(
    backend: str, experiment: Callable[..., ExperimentConfig], tmp_path: Path
) -> None:
    """Adapters of two stages beside each other (O-LoRA), so that the second stage's layers have another form."""
    if backend == "inductor" and shutil.which(cpp_compiler()) is None:
        pytest.skip("needs a C++ compiler")
    small = [
        "order=[colours,shapes]",
        "data.limit_train=8",
        "zero_shot=false",
        "optim.lr=1.0e-3",
        "optim.projector_lr=1.0e-3",
    ]
    strategy = "strategy={name: olora, rank: 4}"
    for name, compiled in (("without", "null"), ("with", backend)):
        run(experiment(tmp_path / name, strategy, *small, f"backbone.compile={compiled}"))
    left, right = adapters(tmp_path / "without"), adapters(tmp_path / "with")
    assert list(left) == ["stage_01", "stage_02"] and left["stage_02"].keys() > left["stage_01"].keys()
    worst = max(
        float((value - right[stage][name]).abs().max()) for stage in left for name, value in left[stage].items()
    )
    assert worst < TOLERANCE
    before, after = (curves(tmp_path / name) for name in ("without", "with"))
    for tag, points in before.items():
        if tag.endswith("train/loss"):
            assert len(points) >= 2 and after[tag] == [(step, pytest.approx(value, rel=1e-4)) for step, value in points]
