"""The backbone presets: every family's classes, at their real architecture without weights and as tiny checkpoints."""

import pickle
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from mcit_lightning.backbone import Backbone, load_backbone, load_processor, wrap
from mcit_lightning.config import BackboneConfig, ExperimentConfig, PromptConfig
from mcit_lightning.data.collate import EvalCollator, TrainCollator
from mcit_lightning.data.encode import mean_colour
from mcit_lightning.data.prompts import build_template
from mcit_lightning.data.records import Sample, Turns
from mcit_lightning.generation import generate_answers
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.loss import answer_loss
from mcit_lightning.processors import images_only
from mcit_lightning.stages import sequential_stages
from mcit_lightning.strategies.sequential import Sequential
from mcit_lightning.towers import Towers, find_targets
from mcit_lightning.validation import build_strategy

PRESETS = {
    "llava13b": "llava",
    "vicuna7b": "llava",
    "vicuna13b": "llava",
    "llava_next7b": "llava_next",
    "llava_onevision": "llava_onevision",
    "internvl3_1b": "internvl",
    "internvl3_2b": "internvl",
    "internvl3_8b": "internvl",
    "smolvlm": "idefics3",
    "smolvlm2": "smolvlm",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
}
"""Preset to the `model_type` of its checkpoints."""
FAMILIES = {family: preset for preset, family in reversed(PRESETS.items())}
"""A preset of each family."""
TARGETS = "{vision: [attention], language: [attention, mlp]}"
ONE: Turns = (("user", "What colour is this?"), ("assistant", "red"))
TWO: Turns = (("user", "Which one?"), ("assistant", "green"), ("user", "And this?"), ("assistant", "blue"))


def experiment(preset: str, folder: Path, *overrides: str) -> ExperimentConfig:
    """The preset with the smoke tasks and sequential LoRA."""
    path = folder / "experiment.yaml"
    base = experiments_dir() / "_base"
    path.write_text(
        f"base: [{base / 'smoke.yaml'}, {base / f'{preset}.yaml'}]\nname: x\nprepare: null\n"
        f"strategy: {{name: sequential, rank: 4, alpha: 8, targets: {TARGETS}}}\n"
    )
    return load_config(path, overrides)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A wide and a tall picture, so that families with tiles cut them differently."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, size in (("wide", (64, 40)), ("tall", (40, 90))):
        Image.new("RGB", size, (200, 30, 30)).save(folder / f"{name}.png")
    return str(folder / "wide.png"), str(folder / "tall.png")


@pytest.fixture(scope="module")
def samples(pictures: tuple[str, str]) -> list[Sample]:
    return [
        Sample("a", "t", pictures[:1], ONE),
        Sample("b", "t", (), TWO),
        Sample("c", "t", pictures[1:], TWO),
    ]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`checkpoint(family)`: folder of a tiny checkpoint, written once."""
    root = tmp_path_factory.mktemp("checkpoints")

    def folder(family: str) -> str:
        if family == "smolvlm":
            pytest.importorskip("num2words", reason="SmolVLM2's processor needs it")
        if not (root / family).exists():
            families.build(family, root / family)
        return str(root / family)

    return folder


# The presets themselves


def test_every_preset_is_tested() -> None:
    files = {path.stem: yaml.safe_load(path.read_text()) for path in (experiments_dir() / "_base").glob("*.yaml")}
    presets = {name for name, content in files.items() if "id" in content.get("backbone", {})}
    assert presets - {"llava7b", "smoke", "quickstart"} == set(PRESETS)


@pytest.mark.parametrize("preset", PRESETS)
def test_targets_name_all_linears_of_the_towers(preset: str, tmp_path: Path) -> None:
    """On the family's own architecture: the groups name every linear of every layer, each once, and attention is not the MLP."""
    config = experiment(preset, tmp_path)
    with torch.device("meta"):
        towers = Towers.of(AutoModelForImageTextToText.from_config(AutoConfig.for_model(PRESETS[preset])))
    for tower in ("vision", "language"):
        groups = config.backbone.targets[tower]
        parts = {name: set(towers.targets(tower, suffixes)) for name, suffixes in groups.items()}
        assert not parts["attention"] & parts["mlp"]
        assert all("att" in path.rpartition(".")[0].rpartition(".")[2] for path in parts["attention"])
        left = {path for path, _ in towers.linears(tower)} - parts["attention"] - parts["mlp"]
        assert not {path for path in left if "layers" in path or "blocks" in path}, left
    assert set(config.strategy["targets"]["language"]) == {n for names in groups.values() for n in names}


def test_a_group_that_the_backbone_does_not_name_is_an_error(tmp_path: Path) -> None:
    config = experiment("llava13b", tmp_path, "strategy.targets={vision: [attenton]}")
    with torch.device("meta"):
        towers = Towers.of(AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava")))
    with pytest.raises(ValueError, match="'attenton' matches no linear"):
        find_targets(towers, config.strategy["targets"])


# Tiny checkpoints of every family, read back from disk


@pytest.mark.parametrize("family", FAMILIES)
def test_training_step_and_generation(family: str, checkpoint: Any, samples: list[Sample], tmp_path: Path) -> None:
    config = experiment(FAMILIES[family], tmp_path, f"backbone.id={checkpoint(family)}", "backbone.image_processor={}")
    backbone, strategy = ready(config)
    collate = TrainCollator(backbone.processor, config.prompt, max_length=600)
    batch = collate(samples)
    loss = answer_loss(backbone.model, batch).loss
    assert_loss_is_the_models_own(backbone.model, batch, loss)
    loss.backward()
    trained = list(strategy.trainable(backbone.towers, sequential_stages(["t"])[0]))
    optimizer = torch.optim.SGD(trained, lr=1.0)
    gradients = {path: layer.lora_b["lora"].grad for path, layer in backbone.towers.adapters.items()}
    moved = {path for path, gradient in gradients.items() if gradient is not None and gradient.abs().sum() > 0}
    assert {backbone.towers.tower_of(path) for path in moved} == {"vision", "language"}
    # a LLaVA reads the last but one layer of its tower, so nothing in the last one can learn
    assert all(".vision_tower." in path for path in gradients.keys() - moved)
    optimizer.step()
    assert answer_loss(backbone.model, batch).loss < loss

    asked = [Sample(s.id, s.task, s.images, s.turns[:-1]) for s in samples]
    inputs = EvalCollator(backbone.processor, config.prompt)(asked)["inputs"]
    end = collate.encoder.end_id
    backbone.model.eval()
    together = generate_answers(backbone.model, backbone.processor, inputs, 3, end)
    for sample, answer in zip(asked, together, strict=True):
        alone = EvalCollator(backbone.processor, config.prompt)([sample])["inputs"]
        assert generate_answers(backbone.model, backbone.processor, alone, 3, end) == [answer]
    assert_adapters_load(config, backbone, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_evaluation_sees_what_training_saw(family: str, checkpoint: Any, samples: list[Sample], tmp_path: Path) -> None:
    config = experiment(FAMILIES[family], tmp_path, f"backbone.id={checkpoint(family)}", "backbone.image_processor={}")
    processor = load_processor(config.backbone)
    collate = TrainCollator(processor, config.prompt, max_length=600)
    trained = collate(samples)
    asked = [Sample(s.id, s.task, s.images, s.turns[:-1], reference=s.turns[-1][1]) for s in samples]
    evaluated = EvalCollator(processor, config.prompt)(asked)
    for row in range(3):
        prompt = evaluated["inputs"]["input_ids"][row][evaluated["inputs"]["attention_mask"][row].bool()]
        assert torch.equal(prompt, trained["inputs"]["input_ids"][row][: len(prompt)])
    for key in set(trained["inputs"]) - {"input_ids", "attention_mask", "mm_token_type_ids"}:
        assert torch.equal(trained["inputs"][key], evaluated["inputs"][key]), key
    end = collate.encoder.template.end
    for row, answers in enumerate((["red"], ["green", "blue"], ["green", "blue"])):
        text = processor.tokenizer.decode(trained["targets"][trained["rows"] == row]).replace(" ", "")
        assert text == "".join(answer + end for answer in answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_go_to_loader_processes(family: str, checkpoint: Any) -> None:
    processor = load_processor(BackboneConfig(id=checkpoint(family)))
    again = pickle.loads(pickle.dumps(processor))
    assert type(again) is type(processor) and again.chat_template == processor.chat_template
    assert "video_processor" not in type(processor).get_attributes()


# Single points


def test_onevision_writes_other_white_space_before_a_given_answer(checkpoint: Any) -> None:
    template = build_template(PromptConfig(), load_processor(BackboneConfig(id=checkpoint("llava_onevision"))))
    pieces = template.pieces(TWO, 1)
    assert pieces[0].prompt == "<|im_start|>user <image>\nWhich one?<|im_end|><|im_start|>assistant\n"
    assert pieces[1].prompt == "<|im_start|>user \nAnd this?<|im_end|><|im_start|>assistant\n"
    assert (template.lead, template.end) == ("", "<|im_end|>")


def test_smolvlm_ends_an_answer_with_its_own_token(checkpoint: Any) -> None:
    template = build_template(PromptConfig(), load_processor(BackboneConfig(id=checkpoint("idefics3"))))
    (piece,) = template.pieces(ONE, 1)
    assert piece.prompt == "<|im_start|>User:<image>What colour is this?<end_of_utterance>\nAssistant:"
    assert (template.lead, template.end) == (" ", "<end_of_utterance>")


def test_a_saved_video_processor_is_left_out(checkpoint: Any, tmp_path: Path) -> None:
    """As the hub's files have one: beside the image processor in processor_config.json."""
    import json
    import shutil

    folder = tmp_path / "model"
    shutil.copytree(checkpoint("internvl"), folder)
    file = folder / "processor_config.json"
    saved = {**json.loads(file.read_text()), "video_processor": {"video_processor_type": "InternVLVideoProcessor"}}
    file.write_text(json.dumps(saved))
    processor = load_processor(BackboneConfig(id=str(folder)))
    assert processor.image_seq_length == 4 and processor.chat_template


def test_settings_of_the_image_processor(checkpoint: Any, pictures: tuple[str, str]) -> None:
    def tiles(**settings: Any) -> int:
        processor = load_processor(BackboneConfig(id=checkpoint("internvl"), image_processor=settings))
        collate = TrainCollator(processor, PromptConfig(), max_length=600)
        return len(collate([Sample("a", "t", pictures[1:], ONE)])["inputs"]["pixel_values"])

    assert (tiles(), tiles(max_patches=1)) == (3, 1)
    with pytest.raises(ValueError, match=r"image_processor.max_patch .*no such setting.*'max_patches'"):
        tiles(max_patch=1)


@pytest.mark.parametrize("preset", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_qwen_presets_cap_the_image_tokens(preset: str, tmp_path: Path) -> None:
    size = experiment(preset, tmp_path).backbone.image_processor["size"]
    side = {"qwen2_vl": 28, "qwen2_5_vl": 28, "qwen3_vl": 32}[preset]
    assert size["longest_edge"] == 1280 * side * side
    processor = images_only("Qwen2VLProcessor")
    assert processor.get_attributes() == ["image_processor", "tokenizer"]


def test_llava_presets_normalise_padding_to_zero(checkpoint: Any) -> None:
    """CLIP's mean colour, rounded down as LLaVA-1.5 does: (122, 116, 104)."""
    assert mean_colour(load_processor(BackboneConfig(id=checkpoint("llava")))) == (122, 116, 104)


def file_pages(model: nn.Module) -> list[bool]:
    """For each parameter, whether it lies in pages of a safetensors file, which all processes share."""
    regions = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, *_, name = [*line.split(maxsplit=5), ""][:6]
        first, _, last = ends.partition("-")
        regions.append((int(first, 16), int(last, 16), name.endswith(".safetensors")))
    return [
        next(file for first, last, file in regions if first <= parameter.data_ptr() < last)
        for parameter in model.parameters()
    ]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_a_base_in_its_stored_type_is_not_copied_by_each_process(smoke_root: Path) -> None:
    own = load_backbone(BackboneConfig(id=str(smoke_root / "model")), precision="32-true").model
    assert all(file_pages(own)) and own.dtype == torch.float32
    converted = load_backbone(BackboneConfig(id=str(smoke_root / "model")), precision="bf16-mixed").model
    assert not any(file_pages(converted)) and converted.dtype == torch.bfloat16


def test_a_missing_package_is_named(checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise ImportError("Package `num2words` is required to run SmolVLM processor.\nInstall it.")

    monkeypatch.setattr("mcit_lightning.backbone.read_processor", refuse)
    with pytest.raises(ValueError, match="needs a package that is not installed: Package `num2words`"):
        load_processor(BackboneConfig(id="x"))


def ready(config: ExperimentConfig) -> tuple[Backbone, Sequential]:
    """The backbone with the strategy's adapters of the first stage, the projector frozen."""
    backbone = load_backbone(config.backbone)
    strategy = build_strategy(config.strategy)
    assert isinstance(strategy, Sequential)
    plan = strategy.plan(sequential_stages(["t"])[0], backbone.towers)
    strategy.grow(backbone.towers, plan)
    towers = {backbone.towers.tower_of(path) for path in plan.ranks}
    assert towers == {"vision", "language"} and len(backbone.towers.injection_plan()) >= 7 + 2
    backbone.model.train()
    return backbone, strategy


def assert_loss_is_the_models_own(model: nn.Module, batch: dict[str, Any], loss: torch.Tensor) -> None:
    labels = torch.full_like(batch["inputs"]["input_ids"], -100)
    labels.view(-1)[batch["positions"] + 1] = batch["targets"]
    with torch.no_grad():
        torch.testing.assert_close(loss.detach(), model(**batch["inputs"], labels=labels).loss, atol=1e-5, rtol=1e-5)


def assert_adapters_load(config: ExperimentConfig, trained: Backbone, batch: dict[str, Any]) -> None:
    """Adapter weights alone, put into a fresh backbone, give the same logits."""
    saved = {name: value for name, value in trained.model.state_dict().items() if "lora_" in name}
    fresh, _ = ready(config)
    result = fresh.model.load_state_dict(saved, strict=False)
    assert not result.unexpected_keys and not any("lora_" in key for key in result.missing_keys)
    with torch.no_grad():
        want, have = (b.model.eval()(**batch["inputs"]).logits for b in (trained, fresh))
    torch.testing.assert_close(have, want)
    assert wrap(fresh.model, fresh.processor, config.backbone).towers.vision == trained.towers.vision
