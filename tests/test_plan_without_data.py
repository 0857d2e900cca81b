"""What is known of a run before weights and data are there: shapes, published numbers of rows, and where things are missing."""

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_dry_run import text_of

from mcit_lightning.config import BackboneConfig, ExperimentConfig, TaskConfig
from mcit_lightning.data.presence import require_files
from mcit_lightning.data.splits import open_split
from mcit_lightning.dry_run import plan
from mcit_lightning.dry_run.memory import count
from mcit_lightning.dry_run.skeleton import architectures, build_towers
from mcit_lightning.generation import generate_answers
from mcit_lightning.loading import experiments_dir, find_experiment, load_config
from mcit_lightning.runner import run
from mcit_lightning.stages import sequential_stages

Config = Callable[..., ExperimentConfig]
PRESETS = {
    path.stem: yaml.safe_load(path.read_text())["backbone"]["id"]
    for path in sorted((experiments_dir() / "_base").glob("*.yaml"))
    if "\nbackbone:\n  id:" in path.read_text() and "data.root" not in path.read_text()
}


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    monkeypatch.setattr(HfApi, "model_info", lambda *_, **__: pytest.fail("the hub was asked"))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_shape_of_every_preset_is_known(preset: str) -> None:
    """Built without weights, it has as many parameters as the published ones."""
    name = PRESETS[preset].rpartition("/")[2]
    backbone = BackboneConfig(id=PRESETS[preset] if "$" not in PRESETS[preset] else f"./no/models/{name}")
    (published,) = (entry["parameters"] for key, entry in architectures().items() if key.endswith(name))
    towers = build_towers(backbone)
    assert float(f"{count(towers.model.parameters()):.2e}") == published
    assert all(parameter.is_meta for parameter in towers.model.parameters())


def test_a_revision_or_another_model_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfApi

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(HfApi, "model_info", offline)
    for backbone in (
        BackboneConfig(id="llava-hf/llava-1.5-7b-hf", revision="v2"),
        BackboneConfig(id="someone/llava-1.5-7b-hf"),
    ):
        with pytest.raises(ValueError, match="the hub does not give it: no network"):
            build_towers(backbone)


def test_dmoles_plan_is_the_papers(tmp_path: Path) -> None:
    """The steps of the released scripts on 8 devices, worked out from the sizes in the paper's Table 1."""
    found = plan(load_config(find_experiment("dmole_llava7b"), [f"data.root={tmp_path}", "trainer.devices=8"]))
    assert [stage.steps for stage in found.steps] == [1465, 1465, 1373, 1185, 2595, 1813, 1285, 1831, 2212]
    assert len(found.inventory.estimated) == 2 * 9 and found.inventory.rows == {}
    text = text_of(found)
    assert (
        "~15,224" in text and "~1,465" in text and "~117,155" in text and "as published, the file is not here" in text
    )
    assert "7.06 B parameters" in text and "each task adapts 112" in text and "unknown" not in text
    assert f"{tmp_path}/data/sk-vg/train.jsonl" in text and "github.com/gcd19/D-MoLE" in text
    assert f"below data.root, {tmp_path}" in text


def test_branchloras_plan_is_the_papers(tmp_path: Path) -> None:
    """222 M and 350 M trainable parameters (BranchLoRA's and CoIN's papers), the projector among them."""
    for name, trainable in (("branchlora_llava7b", 222_371_840), ("moelora_llava7b", 349_904_896)):
        found = plan(load_config(find_experiment(name), [f"data.root={tmp_path}"]))
        assert found.forecast is not None
        assert found.forecast.stages[0].trainable.high + found.projector == trainable
    # what nobody has published stays open
    assert [s.steps is None for s in found.steps] == [t in ("grounding", "ocrvqa") for t in found.config.order]


@pytest.mark.parametrize(("name", "linears"), [("internvl3_2b+dmole9+dmole", 208), ("qwen3_vl+ucit+dmole", 160)])
def test_compositions_with_other_families_are_planned(name: str, linears: int, tmp_path: Path) -> None:
    """D-MoLE's candidates are all linears of the attention of both towers, whatever the family calls them."""
    found = plan(load_config(find_experiment(name), [f"data.root={tmp_path}"]))
    assert found.forecast is not None and sum(row[2] for row in found.forecast.modules) == linears
    assert f"each task adapts {linears // 2}" in found.forecast.choice


def test_limits_apply_to_published_rows(smoke_config: Config, tmp_path: Path) -> None:
    tasks = {"a": TaskConfig(train="a.json", test="b.json", published_rows={"train": 1000, "test": 50}, epochs=2)}
    data = {"root": str(tmp_path), "fraction": 0.1, "limit_test": 20}
    found = plan(smoke_config(order=["a"], tasks=tasks, data=data))
    assert found.inventory.used == {("a", "train"): 100, ("a", "test"): 20} and found.steps[0].steps == 2 * 25
    assert "data.root=FOLDER" in text_of(found)


def test_a_file_that_is_there_counts_itself(smoke_config: Config, smoke_root: Path) -> None:
    own = smoke_config().tasks["colours"]
    config = smoke_config(order=["colours"], tasks={"colours": replace(own, published_rows={"train": 9999})})
    found = plan(config)
    assert (
        found.inventory.used["colours", "train"] == 24 and not found.inventory.estimated and "~" not in text_of(found)
    )


def test_another_number_of_rows_than_published_is_said(smoke_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    config = smoke_config()
    for rows, said in ((24, False), (25, True)):
        caplog.clear()
        task = replace(config.tasks["colours"], published_rows={"train": rows, "test": 1})
        assert len(open_split(config.data, "colours", task, "train", seed=0)) == 24
        assert ("train.json: has 24 rows; published were 25" in caplog.text) is said
        assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tasks.skvg.published_rows={tran: 3}", "no split 'tran'. Did you mean 'train'?"),
        ("tasks.skvg.published_rows={val: 0}", "published_rows.val: is 0, must be a finite number greater than 0"),
        ("tasks.iconqa.min_new_tokens=11", "min_new_tokens: is 11, must be in [0, 10]"),
        ("tasks.iconqa.min_new_tokens=-1", "min_new_tokens: is -1, must be in [0, 10]"),
    ],
)
def test_wrong_values(override: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        load_config(find_experiment("dmole_llava7b"), [override])
    assert said in str(error.value)


def test_missing_files_are_refused_before_the_model_loads(
    smoke_config: Config, smoke_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcit_lightning.runner.load_backbone", lambda *_, **__: pytest.fail("the model was loaded"))
    tasks = dict(smoke_config().tasks)
    tasks["shapes"] = replace(tasks["shapes"], train="shapes/trian.json", references="shapes/answers.json")
    config = smoke_config(tasks=tasks, data={"source": "a shelf"}, out=str(tmp_path / "run"))
    with pytest.raises(ValueError) as error:
        run(config)
    message = str(error.value)
    assert "tasks.shapes.train" in message and f"{smoke_root}/shapes/trian.json does not exist" in message
    assert "1 more files are missing; dry_run=true lists them. The files: a shelf." in message
    tested = [stage for stage in sequential_stages(config.order) if stage.name != "shapes"]
    with pytest.raises(
        ValueError, match=r"tasks\.shapes\.references.*does not exist"
    ):  # its training file is not needed
        require_files(config, tested)
    require_files(smoke_config(), sequential_stages(config.order))


def test_an_answer_does_not_end_too_soon(smoke_config: Config, smoke_processor: Any) -> None:
    from mcit_lightning.backbone import load_backbone
    from mcit_lightning.data.collate import EvalCollator

    config = smoke_config()
    backbone = load_backbone(config.backbone)
    test = open_split(config.data, "shapes", config.tasks["shapes"], "test", seed=0)
    inputs = EvalCollator(backbone.processor, config.prompt)([test[0]])["inputs"]
    with torch.no_grad():
        free = backbone.model.generate(**inputs, max_new_tokens=1, do_sample=False, eos_token_id=-1)  # type: ignore[operator]
    end = int(free[0, -1])  # the answer ends at once
    shown = [generate_answers(backbone.model, backbone.processor, inputs, 6, end, least) for least in (0, 4)]
    assert shown[0] != shown[1] and len(shown[1][0]) > len(shown[0][0])
