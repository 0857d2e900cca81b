"""`dry_run=true`: the plan agrees with what a run then does, and nothing is loaded or written."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from rich.console import Console

from mcit_lightning.__main__ import main
from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import BackboneConfig, ExperimentConfig, TaskConfig
from mcit_lightning.data.splits import open_split
from mcit_lightning.dry_run import Plan, plan, show
from mcit_lightning.dry_run.forecast import Range, forecast
from mcit_lightning.dry_run.inventory import rows_in_use, take_inventory
from mcit_lightning.dry_run.skeleton import build_towers, has_weights, read_config
from mcit_lightning.engine import planned_devices
from mcit_lightning.stages import Stage
from mcit_lightning.towers import Towers
from mcit_lightning.validation import build_strategy

Config = Callable[..., ExperimentConfig]
LORA = {"rank": 4, "alpha": 8}


def text_of(found: Plan) -> str:
    from mcit_lightning.dry_run.tables import plan_tables

    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(plan_tables(found))
    return console.export_text()


def real_towers(config: ExperimentConfig) -> Towers:
    return load_backbone(config.backbone).towers


# ------------------------------------------------------------------------------------------------------------------- steps


def test_steps_are_those_of_a_run(experiment: Config, uninterrupted: Path) -> None:
    done = json.loads((uninterrupted / "state.json").read_text())["steps"]
    assert [steps.steps for steps in plan(experiment(uninterrupted)).steps] == done


@pytest.mark.parametrize(
    ("changes", "tasks", "devices", "expected"),
    [
        ({}, {}, 1, 6),  # 24 rows / 4
        ({}, {"batch_size": 5}, 1, 5),
        ({}, {"epochs": 3}, 1, 18),
        ({"accumulate_grad_batches": 4}, {"epochs": 3}, 1, 6),  # ceil(6 / 4) = 2 per epoch
        ({}, {}, 2, 3),
        ({}, {}, 5, 2),  # 5 rows each, in batches of 4
        ({"limit_train_batches": 2}, {}, 1, 2),
        ({"limit_train_batches": 0.5}, {}, 1, 3),
    ],
)
def test_steps_by_hand(
    smoke_config: Config, changes: dict[str, Any], tasks: dict[str, Any], devices: int, expected: int
) -> None:
    own = TaskConfig(train="colours/train.json", test="colours/test.json", **tasks)
    trainer = {"accelerator": "cpu", "devices": devices, **changes}
    config = smoke_config(order=["colours"], tasks={"colours": own}, trainer=trainer)
    assert plan(config).steps[0].steps == expected


def test_a_joint_stage_repeats_rows_instead_of_epochs(smoke_config: Config) -> None:
    config = smoke_config(strategy={"name": "joint", **LORA})
    config.tasks["shapes"].epochs = 3
    (steps,) = plan(config).steps
    assert (steps.rows, steps.epochs, steps.steps) == (24 + 72 + 24, 1, 30)


@pytest.mark.parametrize(
    ("trainer", "devices"),
    [({"devices": 4}, 4), ({"devices": [0, 2]}, 2), ({"devices": "0,1,3"}, 3), ({"devices": 2, "num_nodes": 3}, 6)],
)
def test_devices(trainer: dict[str, Any], devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned_devices(trainer) == devices
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert planned_devices({}) == 8 and planned_devices({"accelerator": "cpu"}) == 1


@pytest.mark.parametrize("changes", [{}, {"limit_train": 5, "limit_test": 3}, {"fraction": 0.4}, {"fraction": 0.01}])
def test_rows_in_use_are_those_that_are_opened(smoke_config: Config, changes: dict[str, Any]) -> None:
    config = smoke_config(data=changes)
    for split, rows in (("train", 24), ("val", 8), ("test", 8)):
        opened = open_split(config.data, "colours", config.tasks["colours"], split, config.seed)  # type: ignore[arg-type]
        assert rows_in_use(config.data, rows, split) == len(opened)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------------------- adapters


def test_lora_by_hand(smoke_config: Config) -> None:
    """Width 32, keys and values 16, inner width 64, rank 4: 4 (64 + 48 + 48 + 64 + 3 * 96) parameters in each of 2 layers."""
    lora, projector = 2 * 4 * (64 + 48 + 48 + 64 + 3 * 96), 32 * 32 + 32 + 32 * 32 + 32
    trainer = {"accelerator": "cpu", "precision": "32-true"}
    found = plan(smoke_config(strategy={"name": "sequential", **LORA}, trainer=trainer))
    assert found.forecast is not None and found.memory is not None
    assert [stage.trainable for stage in found.forecast.stages] == [Range(lora, lora)] * 3
    assert found.projector == projector
    assert {(tower, end): modules for tower, end, modules, _ in found.forecast.modules}["language", "q_proj"] == 2
    assert found.memory.training == 12 * (lora + projector) and found.memory.stored == 4 * lora
    assert found.memory.base == 4 * found.base
    tokens = 4 * 2048
    assert found.memory.activations == 2 * tokens * 32 * 2 * 40  # float32: twice the bytes; width 32, 2 layers
    text = text_of(found)
    assert f"{(lora + projector) / 1e3:.2f} k" in text and "nothing is missing" in text


@pytest.mark.parametrize(
    "strategy",
    [
        {"name": "sequential", **LORA},
        {"name": "individual", **LORA},
        {"name": "joint", **LORA, "targets": {"vision": ["q_proj"], "language": ["v_proj"]}},
        {"name": "moelora", "rank": 8, "alpha": 16, "experts": 4},
        {"name": "branchlora", "rank": 8, "alpha": 16, "experts": 4},
        {"name": "dmole", **LORA, "allocation": "uniform"},
    ],
    ids=lambda strategy: strategy["name"],
)
def test_parameters_are_those_of_the_real_model(smoke_config: Config, strategy: dict[str, Any]) -> None:
    config = smoke_config(strategy=strategy)
    found = plan(config).forecast
    assert found is not None
    method, towers = build_strategy(config.strategy), real_towers(config)
    for number, stage in enumerate(method.stages(config.order)):
        if stage.reset:
            towers.detach_all()
        method.grow(towers, method.plan(stage, towers))
        trained = sum(parameter.numel() for parameter in method.trainable(towers, stage))
        assert found.stages[number].trainable.high == trained
        adapters = [p for layer in towers.adapters.values() for _, p in layer.adapter_parameters()]
        stored = sum(tensor.numel() for tensor in (*adapters, *method.parameters(), *method.buffers()))
        assert found.stages[number].stored == Range(stored, stored)


@pytest.mark.parametrize("unit", ["module", "layer"])
def test_dmole_stays_within_its_bounds(smoke_config: Config, unit: str) -> None:
    """Whatever the gradients are: three random draws, and the two extremes, which the bounds must reach for modules."""
    settings = {
        "name": "dmole",
        **LORA,
        "unit": unit,
        "targets": {"vision": ["all-linear"], "language": ["all-linear"]},
    }
    config = smoke_config(strategy=settings)
    found = plan(config).forecast
    assert found is not None and found.choice
    bounds = found.stages[0].trainable
    method, towers = build_strategy(config.strategy), real_towers(config)
    paths = [path for own in method.candidates(towers).values() for path in own]  # type: ignore[operator]
    size = {path: sum(towers.model.get_submodule(path).weight.shape) for path in paths}  # type: ignore[arg-type]
    draws = [torch.rand(len(paths), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3)]
    seen = []
    for scores in (*draws, list(size.values()), [1 / value for value in size.values()]):
        for ratio in (0.0, 0.25, 0.5, 0.75, 1.0):
            method.scores = dict(zip(paths, scores, strict=True))
            method.ratios = {"vision": ratio, "language": 1 - ratio}
            ranks = method.plan(Stage(0, "x", ("x",), 0), towers).ranks
            seen.append(sum(rank * size[path] for path, rank in ranks.items()))
    assert bounds.low is not None and bounds.low <= min(seen) and max(seen) <= bounds.high
    if unit == "module":
        assert len(ranks) == len(paths) // 2 and f"adapts {len(ranks)}" in found.choice


def test_branches_that_freeze_make_it_an_upper_bound(smoke_config: Config) -> None:
    strategy = {"name": "branchlora", "rank": 8, "alpha": 16, "experts": 4}
    frozen, kept = (
        plan(smoke_config(strategy={**strategy, "freeze_branches": freeze})).forecast for freeze in (True, False)
    )
    assert frozen is not None and kept is not None
    assert [stage.trainable.low is None for stage in frozen.stages] == [False, True, True]
    assert [stage.trainable.low is None for stage in kept.stages] == [False] * 3


@pytest.mark.parametrize("family", sorted(families.FAMILIES))
def test_every_family_is_built_without_weights(family: str, tmp_path: Path) -> None:
    try:
        families.build(family, tmp_path)
    except ImportError as error:
        pytest.skip(str(error))
    backbone = BackboneConfig(id=str(tmp_path))
    assert has_weights(backbone.id)
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert not has_weights(backbone.id)
    towers = build_towers(backbone)
    assert all(parameter.is_meta for parameter in towers.model.parameters())
    strategy = build_strategy(
        {"name": "sequential", **LORA, "targets": {t: ["all-linear"] for t in ("vision", "language")}}
    )
    (stage,) = forecast(strategy, towers, [Stage(0, "x", ("x",), 0)]).stages
    assert stage.trainable.high > 0 and all(layer.weight.is_meta for layer in towers.adapters.values())


def test_wrong_targets_are_bad_input(smoke_config: Config) -> None:
    with pytest.raises(ValueError, match=r"strategy\.targets\.language.*'q_prj'.*'q_proj'"):
        plan(smoke_config(strategy={"name": "sequential", "targets": {"language": ["q_prj"]}}))


# ----------------------------------------------------------------------------------------------------------------- missing


def test_a_model_that_is_not_there_is_one_line_at_once(smoke_config: Config) -> None:
    began = time.perf_counter()
    found = plan(smoke_config(backbone={"id": "nobody/no-such-model-of-mcit"}))
    assert time.perf_counter() - began < 10
    assert found.unknown is not None and "\n" not in found.unknown and "nobody/no-such-model-of-mcit" in found.unknown
    assert [steps.steps for steps in found.steps] == [6, 6, 6]
    text = text_of(found)
    assert "adapters and memory unknown" in text and "not in the hub's cache" in text


@pytest.mark.parametrize("name", ["/no/such/folder", "./none", "a/b/c"])
def test_a_folder_that_is_not_there_is_not_asked_of_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))
    with pytest.raises(ValueError, match="no such folder"):
        read_config(BackboneConfig(id=name))


def test_a_second_model_of_the_strategy_is_not_loaded(smoke_config: Config) -> None:
    strategy = {"name": "branchlora", "rank": 8, "alpha": 16, "experts": 4, "key_encoder": "nobody/no-such-clip"}
    began = time.perf_counter()
    found = plan(smoke_config(strategy=strategy))
    assert time.perf_counter() - began < 10 and found.forecast is not None
    (lack,) = found.inventory.missing
    assert lack[0] == "strategy.key_encoder" and "nobody/no-such-clip" in lack[1]
    assert "strategy.key_encoder is a model of its own" in text_of(found)


def test_missing_files_are_named_with_their_place(smoke_config: Config, tmp_path: Path) -> None:
    tasks = {
        "a": TaskConfig(train="a/train.json", test="a/test.json", images="pictures", references="a/answers.json"),
        "b": TaskConfig(train="b/train.jsonl", val="b/val.jsonl", test="a/test.json", images="pictures"),
        "c": TaskConfig(train="nobody/no-such-dataset", test="nobody/no-such-dataset", format="hf"),
    }
    found = take_inventory(smoke_config(order=list(tasks), tasks=tasks, data={"root": str(tmp_path)}))
    names = ("a/train.json", "pictures/", "a/test.json", "a/answers.json", "b/train.jsonl", "b/val.jsonl")
    assert [what for _, what in found.missing[:6]] == [f"{tmp_path}/{name}" for name in names]
    assert [key for key, _ in found.missing] == [
        "tasks.a.train", "tasks.a.images", "tasks.a.test", "tasks.a.references",
        "tasks.b.train", "tasks.b.val", "tasks.c.train",
    ]  # fmt: skip
    assert "read from the hub" in found.missing[6][1] and found.rows == {}


def test_missing_pictures_and_broken_rows_are_counted(smoke_config: Config, smoke_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(smoke_root / "colours", root / "colours")
    for number in (4, 5, 6):
        (root / f"colours/images/train_{number:05d}.png").unlink()
    rows = json.loads((root / "colours/val.json").read_text())
    rows[3]["conversations"] = []
    (root / "colours/val.json").write_text(json.dumps(rows))
    (root / "colours/test.json").write_text("[")
    found = take_inventory(smoke_config(order=["colours"], data={"root": str(root)}))
    (lack,) = found.missing
    assert lack[0] == "tasks.colours.images" and "colours/images: 3 pictures of the train rows" in lack[1]
    assert "train_00004.png" in lack[1]
    assert found.rows == {("colours", "train"): 24, ("colours", "val"): 7}
    assert [key for key, _ in found.broken] == ["tasks.colours.val", "tasks.colours.test"]
    assert "1 of 8 rows" in found.broken[0][1] and "syntax error" in found.broken[1][1]


def test_prepare_is_announced_and_not_called(smoke_config: Config, tmp_path: Path) -> None:
    root = tmp_path / "data"
    prepare = {"_target_": "mcit_lightning.smoke.prepare"}
    config = smoke_config(prepare=prepare, data={"root": str(root)}, backbone={"id": str(root / "model")})
    found = plan(config)
    assert not root.exists() and [key for key, _ in found.inventory.missing] == ["backbone.id", "data.root"]
    assert all("mcit_lightning.smoke.prepare" in what for _, what in found.inventory.missing)


# ----------------------------------------------------------------------------------------------------------------- command


def test_nothing_is_loaded_or_written(
    smoke_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoProcessor, PreTrainedModel

    for cls in (PreTrainedModel, AutoProcessor):
        monkeypatch.setattr(cls, "from_pretrained", lambda *_, **__: pytest.fail("weights or tokenizer were loaded"))
    monkeypatch.chdir(tmp_path)
    assert main(["dmole_smoke", "dry_run=true", f"data.root={smoke_root}", "prepare=null"]) == 0
    assert list(tmp_path.iterdir()) == []
    shown = capsys.readouterr().out
    assert "dry run: nothing was loaded" in shown and "each task adapts" in shown
    assert main(["dmole_smoke", "dry_run=true", "strategy.rnk=1"]) == 2


def test_a_strategy_without_stages(smoke_config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    show(smoke_config(strategy={"name": "zero_shot"}))
    assert "only evaluated" in capsys.readouterr().out


def test_memory_by_devices_precision_and_recomputation(smoke_config: Config) -> None:
    trainer = {"accelerator": "cpu", "precision": "32-true"}
    one, two = (plan(smoke_config(trainer={**trainer, "devices": n})).memory for n in (1, 2))
    assert one is not None and two is not None
    assert two.training * 12 == one.training * 16
    half = plan(smoke_config(trainer={**trainer, "precision": "bf16-mixed"}))
    assert half.memory is not None and half.memory.activations is not None and one.activations is not None
    assert half.memory.base == 2 * half.base + 2 * half.projector and half.memory.activations * 2 == one.activations
    recomputed = plan(smoke_config(trainer=trainer, backbone={"activation_checkpointing": True})).memory
    assert recomputed is not None and recomputed.activations == one.activations * (2 * 2 + 40) // (2 * 40)
