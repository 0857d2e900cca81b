"""Experiments put together by name, `llava7b+ucit+dmole`: the same as a file with the same bases."""

from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path

import pytest
import yaml

from mcit_lightning.__main__ import main
from mcit_lightning.composition import compose
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, find_experiment, flatten, load_config

PARTS = "llava7b+ucit+dmole"


def composed(name: str, *overrides: str) -> ExperimentConfig:
    return load_config(find_experiment(name), overrides)


def test_the_parts_are_merged_as_bases_are(tmp_path: Path) -> None:
    base = experiments_dir() / "_base"
    names = ", ".join(str(base / f"{part}.yaml") for part in ("llava7b", "ucit", "strategy/dmole"))
    (tmp_path / "x.yaml").write_text(f"base: [{names}]\nname: {PARTS}\n")
    assert composed(PARTS) == load_config(tmp_path / "x.yaml")


def test_the_order_of_the_parts_does_not_matter() -> None:
    configs = [replace(composed("+".join(parts)), name="") for parts in permutations(PARTS.split("+"))]
    assert all(config == configs[0] for config in configs)
    assert configs[0].callbacks[0]["_target_"] == "callbacks.GradientProbe"


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("dmole_llava7b", "llava7b+dmole9+dmole"),
        ("branchlora_llava7b", "llava7b+coin+branchlora"),
        ("moelora_llava7b", "llava7b+coin+moelora"),
    ],
)
def test_named_experiments_are_compositions(name: str, parts: str) -> None:
    """But for what only the named one says: its name, no zero-shot row, its precision."""
    one, other = (flatten(asdict(composed(which))) for which in (name, parts))
    different = {key for key in one.keys() | other.keys() if one.get(key) != other.get(key)}
    assert different <= {"name", "zero_shot", "trainer.precision", "strategy.feature_cache"}


def test_a_strategy_without_a_file_has_its_defaults() -> None:
    config = composed("qwen3_vl+mllm_cl_domain+sequential", "strategy.rank=32", "order=[fin,rs]")
    assert config.strategy == {"name": "sequential", "rank": 32} and config.order == ["fin", "rs"]
    assert (config.name, config.tasks["med"].epochs) == ("qwen3_vl+mllm_cl_domain+sequential", 3)


def test_a_file_of_ones_own_is_a_part(tmp_path: Path) -> None:
    tasks = "{a: {train: a.json, test: b.json}}"
    (tmp_path / "mine.yaml").write_text(f"data: {{root: /data}}\norder: [a]\ntasks: {tasks}\n")
    config = composed(f"internvl3_1b+{tmp_path}/mine.yaml+joint")
    assert (config.name, config.order, config.strategy) == ("internvl3_1b+mine+joint", ["a"], {"name": "joint"})
    (tmp_path / "a+b.yaml").write_text("name: x\n")  # a file may have a plus in its name
    assert compose(str(tmp_path / "a+b.yaml"), experiments_dir()) is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("llava7b+ucti+dmole", "no backbone, benchmark or strategy 'ucti'. Did you mean 'ucit'?"),
        ("llava7b+ucit+dmol", "'dmol'. Did you mean 'dmole'?"),
        ("llava7b+ucit", "strategy.name: is None, must name a strategy"),
        ("llava7b+dmole", "no part is a benchmark; name one benchmark"),
        ("ucit+dmole", "no part is a backbone; name one backbone"),
        ("llava7b+ucit+coin+dmole", "ucit and coin are two benchmarks; name one"),
        ("llava7b+qwen2_vl+ucit+dmole", "llava7b and qwen2_vl are two backbones; name one"),
        ("llava7b+ucit+dmole+joint", "names 2 strategies, dmole and joint; name one"),
        ("llava7b++dmole", "no backbone, benchmark or strategy ''"),
        ("ucit", "'ucit': it is a part of one. Name a backbone, a benchmark and a strategy"),
        ("dmole", "'dmole': it is a part of one"),
    ],
)
def test_what_is_no_experiment_is_said(name: str, said: str) -> None:
    with pytest.raises(ValueError) as error:
        composed(name)
    assert said in str(error.value)


def test_a_part_of_its_data_and_the_run_on_it(
    smoke_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"data.root={smoke_root}", f"backbone.id={smoke_root}/model", "prepare=null", "order=[shapes]"]
    overrides += ["trainer.accelerator=cpu", "trainer.enable_progress_bar=false", "zero_shot=false"]
    out = tmp_path / "part"
    assert main(["data", "sample", "smoke+sequential", *overrides, "--rows", "4", "--out", str(out)]) == 0
    (file,) = out.glob("*.yaml")
    assert yaml.safe_load(file.read_text())["base"] == [str(experiments_dir() / "_base/smoke.yaml")]
    assert main([str(file), f"out={tmp_path / 'run'}"]) == 0
    results = Results.load(tmp_path / "run")
    assert (results.experiment, results.strategy) == ("smoke+sequential_sample", "sequential")
    assert "shapes" in capsys.readouterr().out
