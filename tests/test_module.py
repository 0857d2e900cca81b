"""The module: parameter groups, schedule, precision, growth by plans, and checkpoints of adapters only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mcit_lightning.backbone import base_dtype, load_backbone
from mcit_lightning.config import BackboneConfig, ExperimentConfig, OptimConfig
from mcit_lightning.engine import build_engine, resolve_precision
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.module import MCITModule
from mcit_lightning.optimization import build_optimizer, build_schedule
from mcit_lightning.stages import Stage
from mcit_lightning.validation import build_strategy

FIRST = Stage(0, "colours", ("colours",), 0)


@pytest.fixture
def experiment(smoke_root: Path) -> Callable[..., ExperimentConfig]:
    def make(*overrides: str) -> ExperimentConfig:
        return load_config(experiments_dir() / "smoke.yaml", [f"data.root={smoke_root}", *overrides])

    return make


def build(config: ExperimentConfig, precision: str = "32-true", run_id: str = "run") -> MCITModule:
    backbone = load_backbone(config.backbone, precision=precision)
    return MCITModule(backbone, build_strategy(config.strategy), config, run_id)


def grown(config: ExperimentConfig, **kwargs: Any) -> MCITModule:
    module = build(config, **kwargs)
    module.grow(module.strategy.plan(FIRST, module.towers))
    return module


def test_each_tower_has_a_named_group_with_its_own_rate(experiment: Callable[..., ExperimentConfig]) -> None:
    config = experiment("strategy.targets={language: [q_proj], vision: [all-linear]}")
    module = grown(config)
    optim = OptimConfig(lr=1e-3, vision_lr=2e-3, projector_lr=3e-3)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    for layer in module.towers.adapters.values():
        for _, parameter in layer.adapter_parameters():
            parameter.requires_grad_(True)
    for path in module.towers.projector:
        module.model.get_submodule(path).requires_grad_(True)
    groups = {g["name"]: g for g in build_optimizer(module.named_parameters(), module._group_of, optim).param_groups}
    assert {name: group["lr"] for name, group in groups.items()} == {
        "language": 1e-3,
        "vision": 2e-3,
        "projector": 3e-3,
    }
    sizes = {name: sum(p.numel() for p in group["params"]) for name, group in groups.items()}
    plan = module.towers.injection_plan()
    assert sizes["vision"] == sum(row[4] for row in plan if row[0] == "vision")
    assert sizes["language"] == sum(row[4] for row in plan if row[0] == "language")
    of_task = build_optimizer(module.named_parameters(), module._group_of, optim, task_lr=9e-3)
    task = {group["name"]: group["lr"] for group in of_task.param_groups}
    assert task == {"language": 9e-3, "vision": 9e-3, "projector": 3e-3}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_warmup_and_decay(schedule: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1.0)
    config = OptimConfig(lr=1.0, warmup_ratio=0.2, schedule=schedule)  # type: ignore[arg-type]
    scheduler = build_schedule(optimizer, config, steps=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])
    expected = {"cosine": 0.5, "linear": 0.5, "constant": 1.0}[schedule]
    assert rates[6] == pytest.approx(expected)
    assert rates[-1] < 0.2 or schedule == "constant"


def test_base_is_bfloat16_and_what_trains_is_float32_under_bf16_mixed(
    experiment: Callable[..., ExperimentConfig],
) -> None:
    module = grown(experiment(), precision="bf16-mixed")
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    saved = module.saved_keys()
    assert {dtype for name, dtype in dtypes.items() if name in saved} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name not in saved} == {torch.bfloat16}
    assert base_dtype(BackboneConfig(dtype="float16"), "bf16-mixed") == torch.float16


def test_precision_and_engine_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    assert resolve_precision({"precision": "auto"}) == "bf16-mixed"
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    assert resolve_precision({"precision": "auto"}) == "32-true"
    assert resolve_precision({"precision": "bf16-mixed"}) == "bf16-mixed"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert resolve_precision({}) == "bf16-mixed"
    assert resolve_precision({"accelerator": "cpu"}) == "32-true"
    assert build_engine({"devices": 1}, find_unused=False) == "auto"
    engine = build_engine({"devices": 2}, find_unused=False)
    assert engine._ddp_kwargs == {"find_unused_parameters": False, "broadcast_buffers": False}  # type: ignore[union-attr]
    engine = build_engine({"strategy": "ddp", "devices": 1}, find_unused=True)
    assert engine._ddp_kwargs["find_unused_parameters"]  # type: ignore[union-attr]


def test_activation_checkpointing_recomputes_the_decoder(experiment: Callable[..., ExperimentConfig]) -> None:
    def forwards(enabled: bool) -> int:
        module = grown(experiment(f"backbone.activation_checkpointing={enabled}"))
        module.requires_grad_(False)
        layers = list(module.towers.adapters.values())
        layers[0].lora_b.requires_grad_(True)
        calls = []
        handle = layers[0].base.register_forward_hook(lambda *_: calls.append(1))
        module.model.train()
        ids = torch.tensor([[5, 6, 7]])
        module.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.sum().backward()
        handle.remove()
        return len(calls)

    assert (forwards(False), forwards(True)) == (1, 2)


def test_replay_and_load_give_the_same_logits(experiment: Callable[..., ExperimentConfig]) -> None:
    module = grown(experiment())
    for layer in module.towers.adapters.values():
        torch.nn.init.normal_(layer.lora_b["lora"], std=0.1)
    checkpoint = saved(module)
    again = build(experiment())
    again.load_weights(checkpoint)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(module.model(**inputs).logits, again.model(**inputs).logits)
    assert not torch.equal(again.model(**inputs).logits, build(experiment()).model(**inputs).logits)
    again.reset()
    assert torch.equal(again.model(**inputs).logits, build(experiment()).model(**inputs).logits)


def saved(module: MCITModule) -> dict[str, Any]:
    """What a checkpoint of the module holds, without a Trainer."""
    keys = module.saved_keys()
    state = {name: value.clone() for name, value in module.state_dict().items() if name in keys}
    about = {"format": 1, "run_id": module.run_id, "structure": module.structure.to_list(), "stage": "colours"}
    return {"state_dict": state, "mcit": about}


def test_a_checkpoint_that_does_not_fit_is_refused(experiment: Callable[..., ExperimentConfig]) -> None:
    checkpoint = saved(grown(experiment()))
    some = next(iter(checkpoint["state_dict"]))
    for change, message in [
        (lambda c: c["state_dict"].pop(some), "missing"),
        (lambda c: c["state_dict"].update(typo=torch.zeros(1)), r"unexpected \['typo'\]"),
        (lambda c: c["mcit"].update(run_id="other"), "belongs to run other"),
        (lambda c: c["mcit"].update(format=2), "not a checkpoint"),
        (lambda c: c["state_dict"].update({some: torch.zeros(1, 1)}), "does not match the planned structure"),
        (lambda c: c["mcit"]["structure"][0]["ranks"].clear(), "unexpected"),
    ]:
        broken = {"state_dict": dict(checkpoint["state_dict"]), "mcit": {**checkpoint["mcit"]}}
        broken["mcit"]["structure"] = [
            {**entry, "ranks": dict(entry["ranks"])} for entry in checkpoint["mcit"]["structure"]
        ]
        change(broken)
        with pytest.raises(ValueError, match=message):
            build(experiment()).load_weights(broken)
    with pytest.raises(ValueError, match="contradicts"):
        module = build(experiment("strategy.rank=2"))
        module.grow(module.strategy.plan(FIRST, module.towers))
        module.load_weights(checkpoint)


def test_the_projector_can_stay_frozen(experiment: Callable[..., ExperimentConfig]) -> None:
    module = grown(experiment("backbone.train_projector=false"))
    assert not any("projector" in key for key in module.saved_keys())


def test_a_backbone_that_cannot_be_loaded_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"backbone\.id: cannot load .*nowhere.*folder"):
        load_backbone(BackboneConfig(id=str(tmp_path / "nowhere")))
