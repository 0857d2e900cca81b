"""Quantised bases: what is refused, and adapters over weights that are no floating-point numbers.

The last test runs where the extra `quantized` is installed: bitsandbytes also computes on a CPU, slowly.
"""

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, BitsAndBytesConfig

from mcit_lightning import quantization
from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import BackboneConfig, ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.dry_run import plan
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.module import MCITModule
from mcit_lightning.quantization import quantization_arguments
from mcit_lightning.stages import sequential_stages
from mcit_lightning.towers import Towers
from mcit_lightning.validation import build_strategy


class Int8Linear(nn.Linear):
    """A linear whose weight is int8 with one factor, as bitsandbytes' are: not floating point, and without a gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.factor = linear.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.factor).round().to(torch.int8), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.factor.to(x.dtype), self.bias)


def quantise(towers: Towers) -> None:
    for path, linear in list(towers.linears("language")):
        parent, _, name = path.rpartition(".")
        assert isinstance(linear, nn.Linear)
        setattr(towers.model.get_submodule(parent), name, Int8Linear(linear))


def test_adapters_over_a_quantised_linear_are_float32_and_learn() -> None:
    torch.manual_seed(0)
    layer = AdapterLinear(Int8Linear(nn.Linear(6, 5)), scale=2.0)
    layer.add_branch("b", 2, seed=0, path="m")
    layer.add_router("r", seed=0, path="m")
    assert {value.dtype for _, value in layer.adapter_parameters()} == {torch.float32}
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(layer(x), layer.base(x))
    layer(x).square().sum().backward()
    assert layer.lora_b["b"].grad is not None and layer.lora_b["b"].grad.norm() > 0 and layer.base.weight.grad is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.bfloat16()).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="quantised base cannot be merged"):
        layer.merge()


@pytest.mark.parametrize("strategy", [{"name": "branchlora", "rank": 8, "experts": 4}, {"name": "sequential"}])
def test_a_stage_on_a_quantised_model(
    strategy: dict[str, object], smoke_config: Callable[..., ExperimentConfig]
) -> None:
    config = smoke_config(strategy=strategy)
    backbone = load_backbone(config.backbone)
    quantise(backbone.towers)
    before = [linear.weight.clone() for _, linear in backbone.towers.linears("language")]
    learn(MCITModule(backbone, build_strategy(config.strategy), config), config)
    after = [linear.weight for _, linear in backbone.towers.linears("language")]
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def learn(module: MCITModule, config: ExperimentConfig) -> None:
    """A few steps of the first task; its loss falls, and the base stays quantised."""
    stages = sequential_stages(config.order)
    stream = ContinualDataModule(config, module.processor, stages)
    module.grow(module.strategy.plan(stages[0], module.towers))
    assert len(module.towers.adapters) == 14
    module.requires_grad_(False)
    trained = list(module.strategy.trainable(module.towers, stages[0]))
    for parameter in trained:
        assert parameter.dtype == torch.float32
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    batch = next(iter(stream.train_dataloader()))
    losses = []
    for _ in range(6):
        with module.strategy.routing(module.towers, batch, stages[0].name):
            loss = module.strategy.loss(module.model, batch, stages[0]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.2
    assert not any(layer.base.weight.is_floating_point() for layer in module.towers.adapters.values())


def test_only_the_decoders_linears_are_quantised(smoke_config: Callable[..., ExperimentConfig]) -> None:
    config = smoke_config(backbone={"quantization": "4bit"})
    arguments = quantization_arguments(config.backbone, torch.bfloat16, "cuda:1", {})
    settings = arguments["quantization_config"]
    assert isinstance(settings, BitsAndBytesConfig) and arguments["device_map"] == {"": "cuda:1"}
    assert settings.load_in_4bit and settings.bnb_4bit_quant_type == "nf4"
    assert settings.bnb_4bit_compute_dtype == torch.bfloat16
    whole = settings.llm_int8_skip_modules
    assert "lm_head" in whole and "model.multi_modal_projector.linear_1" in whole
    assert any("vision_tower" in path for path in whole) and not any("language_model" in path for path in whole)
    eight = quantization_arguments(BackboneConfig(id=config.backbone.id, quantization="8bit"), torch.float32, "cpu", {})
    assert eight["quantization_config"].load_in_8bit and not eight["quantization_config"].load_in_4bit


@pytest.mark.parametrize(
    ("overrides", "cuda", "packages", "message"),
    [
        ([], False, True, "needs a CUDA device"),
        (["trainer.accelerator=cpu"], True, True, "needs a CUDA device"),
        ([], True, False, "bitsandbytes.*not installed; pip install"),
        (["trainer.strategy=fsdp2"], True, True, "fsdp2.*use ddp"),
        (["backbone.quantization=3bit"], True, True, "quantization.*3bit"),
    ],
)
def test_what_cannot_work_is_refused_when_the_configuration_loads(
    overrides: list[str], cuda: bool, packages: bool, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(quantization, "find_spec", lambda name: object() if packages else None)
    with pytest.raises(ValueError, match=message):
        load_config(experiments_dir() / "smoke.yaml", ["backbone.quantization=4bit", *overrides])


def test_gradient_probes_of_a_quantised_base_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    dmole, key = experiments_dir() / "dmole_smoke.yaml", "backbone.quantization=8bit"
    with pytest.raises(ValueError, match=r"dmole.*gradients of the base weights.*strategy\.allocation=random"):
        load_config(dmole, [key])
    config = load_config(dmole, [key, "strategy.allocation=random", "strategy.curriculum=false"])
    assert config.backbone.quantization == "8bit"


def test_a_plan_is_made_without_a_gpu_and_counts_smaller_weights(smoke_config: Callable[..., ExperimentConfig]) -> None:
    load_config(experiments_dir() / "smoke.yaml", ["backbone.quantization=4bit", "dry_run=true"])
    trainer = {"accelerator": "cpu", "precision": "32-true"}
    kinds = (None, "8bit", "4bit")
    plans = [plan(smoke_config(backbone={"quantization": kind}, trainer=trainer)) for kind in kinds]
    base = [found.memory.base for found in plans if found.memory is not None]
    weights = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64)
    assert [base[0] - size for size in base] == [0, 3 * weights, int((4 - 0.5625) * weights)]


def test_a_quantised_base_stays_on_its_device(smoke_config: Callable[..., ExperimentConfig]) -> None:
    for kind, calls in ((None, 1), ("8bit", 0)):
        config = smoke_config(strategy={"name": "sequential"})
        module = MCITModule(load_backbone(config.backbone), build_strategy(config.strategy), config)
        config.backbone.quantization = kind
        moved: list[int] = []
        module.model._apply = lambda fn, moved=moved: moved.append(1)  # type: ignore[method-assign,misc]
        assert module.cpu() is module and len(moved) == calls


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_bitsandbytes_itself(
    kind: str, smoke_root: Path, tmp_path: Path, smoke_config: Callable[..., ExperimentConfig]
) -> None:
    shutil.copytree(smoke_root / "model", tmp_path / "model")  # wider: rows must hold a block of 64
    wide = AutoConfig.from_pretrained(tmp_path / "model")
    wide.text_config.update({"hidden_size": 128, "intermediate_size": 128, "head_dim": 32})
    AutoModelForImageTextToText.from_config(wide).save_pretrained(tmp_path / "model")
    backbone = {"id": str(tmp_path / "model"), "quantization": kind}
    config = smoke_config(strategy={"name": "branchlora", "rank": 8, "experts": 4}, backbone=backbone)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = MCITModule(load_backbone(config.backbone, device=device), build_strategy(config.strategy), config)
    learn(module.to(device), config)
    assert {type(layer.base).__module__.partition(".")[0] for layer in module.towers.adapters.values()} == {
        "bitsandbytes"
    }
    projector = module.model.get_submodule(module.towers.projector[0])
    assert all(value.dtype == torch.float32 for value in projector.parameters())
