"""Experiment files: precedence, overrides, and one clear error for every mistake."""

from pathlib import Path

import pytest
import yaml

from mcit_lightning.loading import experiments_dir, find_experiment, load_config, to_yaml
from mcit_lightning.validation import build_strategy

SMOKE = experiments_dir() / "smoke.yaml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(experiments_dir().glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_experiment_loads(path: Path) -> None:
    config = load_config(path)
    assert config.name == path.stem
    assert config.order and set(config.order) <= set(config.tasks)
    assert yaml.safe_load(to_yaml(config))["strategy"] == config.strategy


def test_later_files_and_overrides_win(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", f"base: {SMOKE}\nseed: 1\noptim: {{lr: 1e-4, weight_decay: 0.5}}\n")
    write(tmp_path, "b.yaml", "seed: 2\n")
    path = write(tmp_path, "c.yaml", "base: [a.yaml, b.yaml]\nname: c\noptim: {lr: 3e-4}\n")
    config = load_config(path, ["tasks.colours.epochs=7", "order=[shapes,colours]", "trainer.devices=2"])
    assert (config.seed, config.name, config.optim.lr, config.optim.weight_decay) == (2, "c", 3e-4, 0.5)
    assert config.tasks["colours"].epochs == 7
    assert config.tasks["colours"].train == "colours/train.json"
    assert config.order == ["shapes", "colours"]
    assert config.trainer["devices"] == 2 and config.trainer["precision"] == "32-true"


def test_order_defaults_to_the_tasks_as_written(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", f"base: {SMOKE}\nname: x\norder: []\n")
    assert load_config(path).order == ["colours", "shapes", "counts"]


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sed=1", ["sed", "'seed'"]),
        ("optim.lrr=1", ["optim.lrr", "'lr'"]),
        ("tasks.colors.epochs=2", ["colors", "'colours'"]),
        ("tasks.colours.epoch=2", ["tasks.colours.epoch", "'epochs'"]),
        ("tasks.colours.epochs=two", ["tasks.colours.epochs", "two"]),
        ("tasks.colours.epochs=0", ["tasks.colours.epochs", "0"]),
        ("tasks.colours.metric=exakt_match", ["tasks.colours.metric", "exact_match"]),
        ("order=[colours,shape]", ["order", "'shape'", "'shapes'"]),
        ("order=[colours,colours]", ["order", "twice"]),
        ("strategy=branchlora", ["strategy:", "mapping", "write strategy.name=branchlora"]),
        ("strategy.name=sequentiel", ["strategy.name", "'sequentiel'", "'sequential'"]),
        ("strategy.rnak=4", ["strategy.rnak", "'rank'"]),
        ("strategy.rank=four", ["strategy", "rank", "four"]),
        ("strategy.rank=0", ["rank", "0"]),
        ("trainer.device=2", ["trainer.device", "'devices'"]),
        ("trainer.max_epochs=2", ["trainer.max_epochs", "tasks.<name>.epochs"]),
        ("trainer.strategy=fsdp", ["trainer.strategy", "fsdp", "refused"]),
        ("trainer.strategy=fsdp_cpu_offload", ["trainer.strategy", "refused", "use fsdp2"]),
        ("trainer.strategy=deepspeed_stage_1", ["trainer.strategy", "refused", "deepspeed_stage_2"]),
        ("trainer.strategy=deepspeed_stage_3_offload", ["trainer.strategy", "refused", "use fsdp2"]),
        ("trainer.strategy=ddp_fork", ["trainer.strategy", "refused", "use ddp"]),
        ("trainer.strategy=model_parallel", ["trainer.strategy", "refused", "use fsdp2"]),
        ("trainer.strategy=dpp", ["trainer.strategy", "'dpp'", "ddp, "]),
        ("trainer={strategy: fsdp2, precision: 16-mixed}", ["trainer.precision", "16-mixed", "bf16-mixed"]),
        ("data.fraction=1.5", ["data.fraction", "1.5"]),
        ("prompt.template=vicunia", ["vicunia"]),
        ("callbacks=[{_target_: callbacks.StageCheckpont}]", ["callbacks[0]", "StageCheckpont", "'StageCheckpoint'"]),
        ("callbacks=[{_target_: callbacks.StageCheckpoint, every: 3}]", ["callbacks[0].every", "every_n_steps"]),
        ("callbacks=[{_target_: nowhere.Thing}]", ["callbacks[0]", "nowhere"]),
        ("callbacks=[{_target_: pathlib.Path}]", ["callbacks[0]", "pathlib.Path", "Callback"]),
        ("seed", ["'seed'", "key=value"]),
        ("seed=-1", ["seed", "-1"]),
        ("optim.betas=[1.5,0.9]", ["optim.betas", "1.5"]),
        ("trainer.accumulate_grad_batches=0", ["trainer.accumulate_grad_batches", "0"]),
        ("trainer.fast_dev_run=true", ["trainer.fast_dev_run", "data.limit_train"]),
        ("strategy.targets={}", ["targets"]),
        ("callbacks=[{_target_: callbacks.BackwardTransfer}]", ["callbacks.StageCheckpoint"]),
        ("callbacks=[{_target_: callbacks.StageCheckpoint}]", ["callbacks.BackwardTransfer"]),
        ("strategy={name: branchlora}", ["'branchlora'", "callbacks.BranchFreeze"]),
        ("imports=[nowhere_to_be_found]", ["imports", "'nowhere_to_be_found'", "PYTHONPATH"]),
        ("tasks={my/task: {train: a, test: b}}", ["tasks.my/task"]),
        ("order=[colours", ["order=[colours"]),
    ],
)
def test_a_wrong_override_is_named_with_its_remedy(override: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(SMOKE, [override])
    for part in parts:
        assert part in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("name: x\nbase: gone.yaml", ["gone.yaml", "base:"]),
        ("base: x.yaml", ["cycle"]),
        ("name: [", ["x.yaml", "YAML"]),
        ("name: x\nname: y", ["duplicate", "name"]),
        ("- a\n- b", ["mapping"]),
        ("base: 3", ["base:"]),
        ("name: x\nbakcbone: {id: a}", ["bakcbone", "'backbone'"]),
        ("name: x", ["is not set"]),
    ],
)
def test_a_wrong_file_is_named_with_its_remedy(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = write(tmp_path, "x.yaml", text)
    with pytest.raises(ValueError) as error:
        load_config(path)
    for part in [*parts, "x.yaml"]:
        assert part in str(error.value), str(error.value)


def test_a_missing_value_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", "name: x\ndata: {root: /nowhere}\nstrategy: {name: sequential}\n")
    with pytest.raises(ValueError, match=r"backbone\.id is not set"):
        load_config(path)


def test_experiments_are_found_by_name_and_by_path(tmp_path: Path) -> None:
    assert find_experiment("smoke") == SMOKE
    assert find_experiment("experiments/smoke.yaml").name == "smoke.yaml"
    with pytest.raises(ValueError, match=r"no experiment 'smok'.*Did you mean 'smoke'"):
        find_experiment("smok")
    with pytest.raises(ValueError, match="no experiment"):  # not the shipped one of the same name
        find_experiment("/some/where/else/smoke.yaml")


def test_given_targets_replace_the_default_ones() -> None:
    config = load_config(SMOKE, ["strategy.targets={vision: [q_proj]}"])
    assert build_strategy(config.strategy).config.targets == {"vision": ["q_proj"]}


def test_a_strategy_of_the_users_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that the README shows."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    code = readme.split("```python", 1)[1].split("```", 1)[0]
    write(tmp_path, "fresh_lora.py", code)
    monkeypatch.syspath_prepend(tmp_path)
    config = load_config(SMOKE, ["imports=[fresh_lora]", "strategy={name: fresh_lora, rank: 2}"])
    assert type(build_strategy(config.strategy)).__name__ == "FreshLoRA"


def test_hyper_parameters_of_a_bases_other_strategy_are_left_behind(tmp_path: Path) -> None:
    path = write(tmp_path, "x.yaml", f"base: {SMOKE}\nname: x\nstrategy: {{name: moelora, rank: 8}}\n")
    assert load_config(path).strategy == {"name": "moelora", "rank": 8}


def test_a_mapping_under_strategy_replaces_the_one_before_it(tmp_path: Path) -> None:
    """Else `targets={language: [...]}`, an ablation, would keep the other tower's adapters."""
    targets = {"language": ["all-linear"]}
    config = load_config(experiments_dir() / "dmole_quickstart.yaml", ["strategy.targets={language: [all-linear]}"])
    assert config.strategy["targets"] == targets and config.strategy["rank"] == 16
    file = tmp_path / "own.yaml"
    file.write_text(
        f"base: {experiments_dir() / 'dmole_quickstart.yaml'}\nstrategy: {{targets: {{language: [all-linear]}}}}\n"
    )
    config = load_config(file)
    assert config.strategy["targets"] == targets and config.strategy["rank"] == 16
    nested = load_config(experiments_dir() / "dmole_quickstart.yaml", ["tasks.flags={epochs: 2}"])
    assert nested.tasks["flags"].epochs == 2 and nested.tasks["flags"].train == "flags/train.json"
