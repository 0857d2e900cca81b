"""The experiments that the README names, from their files to `results.json`: one batch a task on a tiny model of their class.

Only the sizes differ from a real run: the checkpoint, the rows, the processor and the number of epochs.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import families
import pytest
import torch
from smoke_runs import curves
from test_benchmarks import write_benchmark

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run

FAMILY = {
    "dmole_llava7b": "llava",
    "dmole_internvl2b": "internvl",
    "branchlora_llava7b": "llava",
    "moelora_llava7b": "llava",
    "sequential_llava7b": "llava",
}
TASKS = {
    "dmole_llava7b": ("skvg", "iconqa"),
    "dmole_internvl2b": ("ocrvqa", "vizwiz"),
    "branchlora_llava7b": ("scienceqa", "grounding"),
    "moelora_llava7b": ("gqa", "ocrvqa"),
    "sequential_llava7b": ("imagenet", "textvqa"),
}
"""Two tasks of each, of different formats and metrics."""
BENCHMARK = {name: "dmole9" if name.startswith("dmole") else "coin" for name in FAMILY}
ATTENTION = 4
LINEARS = 7
"""Linears of a decoder layer, those of its attention among them."""
LAYERS = 2
"""Of the tiny decoders."""
VISION_LAYERS = {"llava": 3, "internvl": 2}


class Done(NamedTuple):
    """A finished run: its configuration, directory and results."""

    config: ExperimentConfig
    root: Path
    results: Results

    def checkpoint(self, stage: int) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(self.root / f"stage_{stage:02d}/final.ckpt", weights_only=True)
        return checkpoint


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Done]:
    """`done(name)`: the run of an experiment, made once."""
    folder, runs = tmp_path_factory.mktemp("named"), dict[str, Done]()

    def make(name: str) -> Done:
        if name not in runs:
            model = folder / FAMILY[name]
            if not model.exists():
                families.build(FAMILY[name], model)
            config = small(name, model, folder)
            written = replace(config, tasks={task: config.tasks[task] for task in config.order})
            write_benchmark(BENCHMARK[name], written)
            run(config)
            runs[name] = Done(config, folder / name, Results.load(folder / name))
        return runs[name]

    return make


def small(name: str, model: Path, folder: Path) -> ExperimentConfig:
    tasks = TASKS[name]
    overrides = [
        f"backbone.id={model}",
        f"data.root={folder / BENCHMARK[name]}",
        f"out={folder / name}",
        f"order=[{','.join(tasks)}]",
        *(f"tasks.{task}.epochs=1" for task in tasks),
        "zero_shot=false",
        "data.limit_train=2",
        "data.limit_test=1",
        "data.num_workers=0",
        "data.max_new_tokens=3",
        *(f"tasks.{task}.max_new_tokens=3" for task in tasks),
        "trainer.accelerator=cpu",
        "trainer.devices=1",
        "trainer.precision=32-true",
        "trainer.enable_progress_bar=false",
    ]
    return load_config(experiments_dir() / f"{name}.yaml", overrides)


def test_all_named_experiments_are_here() -> None:
    """Every shipped experiment that needs a hub checkpoint and a published benchmark."""
    shipped = {
        path.stem for path in experiments_dir().glob("*.yaml") if not path.stem.endswith(("smoke", "quickstart"))
    }
    assert shipped == set(FAMILY)


@pytest.mark.parametrize("name", FAMILY)
def test_one_batch_a_task_from_the_file_to_the_results(name: str, done: Callable[[str], Done]) -> None:
    config, root, results = done(name)
    first, second = TASKS[name]
    assert config.backbone.activation_checkpointing
    assert results.matrix.filled_rows() == [0, 1] and None not in results.matrix.scores[1]
    assert (results.matrix.scores[0][1] is None) is (config.evaluate == "seen")
    assert results.tasks == [first, second] and results.summary["BWT"] is not None
    assert json.loads((root / "state.json").read_text())["steps"] == [1, 1]
    for number, task in enumerate(TASKS[name], start=1):
        (answer,) = (root / f"predictions/stage_{number:02d}/{task}.jsonl").read_text().splitlines()
        assert json.loads(answer)["task"] == task
    for row in results.cost:
        assert row.trainable_params and row.stored_params and row.train_seconds and row.eval_seconds
    assert "Accuracy matrix" in (root / "report.html").read_text()


@pytest.mark.parametrize("name", FAMILY)
def test_the_batch_was_learnt_from(name: str, done: Callable[[str], Done]) -> None:
    """An adapter's second matrix starts at zero; it moves in every tower that the task has adapters in."""
    own = done(name)
    for stage, task in enumerate(TASKS[name], start=1):
        budget = own.results.allocation.get(task, {"budget": {"language": 1}})["budget"]
        state = own.checkpoint(stage)["state_dict"]
        new = {
            key: value
            for key, value in state.items()
            if ".lora_b." in key and (task in key or not own.results.allocation)
        }
        moved = [key for key, value in new.items() if value.abs().sum() > 0]
        assert {"vision" if "vision_tower" in key else "language" for key in moved} == {
            t for t, n in budget.items() if n
        }


@pytest.mark.parametrize("name", ["dmole_llava7b", "dmole_internvl2b"])
def test_dmole_probes_splits_allocates_and_routes(name: str, done: Callable[[str], Done]) -> None:
    _, root, results = done(name)
    candidates = ATTENTION * (LAYERS + VISION_LAYERS[FAMILY[name]])
    assert list(results.allocation) == list(TASKS[name]) and results.routing is not None
    for task, cost in zip(TASKS[name], results.cost, strict=True):
        decided = results.allocation[task]
        assert len(decided["scores"]) == candidates and max(decided["scores"].values()) > 0
        assert sum(decided["budget"].values()) == len(decided["ranks"]) == candidates // 2
        assert set(decided["ranks"].values()) == {8}
        assert sum(decided["ratios"].values()) == pytest.approx(1) and min(decided["difficulty"].values()) > 0
        assert cost.proxy_seconds and cost.router_seconds and cost.routing_seconds_per_sample
    shares = [value for tag, points in curves(root).items() if tag.endswith("curriculum/vision") for _, value in points]
    assert shares == pytest.approx([results.allocation[task]["ratios"]["vision"] for task in TASKS[name]], rel=1e-5)
    state = done(name).checkpoint(2)["state_dict"]
    assert not any("projector" in key or ".base." in key for key in state)
    assert {key.rpartition(".")[2] for key in state if ".lora_" in key} == set(TASKS[name])


def test_branchlora_spawns_routers_and_freezes(done: Callable[[str], Done]) -> None:
    own = done("branchlora_llava7b")
    assert list(own.results.freezing) == list(TASKS["branchlora_llava7b"])
    for frozen in own.results.freezing.values():
        assert len(frozen) == LINEARS * LAYERS and all(frozen.values())
    (branches,) = {len(names) for names in own.results.modules["language"].values()}
    assert branches == own.config.strategy["experts"] == 8
    state = own.checkpoint(2)["state_dict"]
    routers = {key for key in state if "router" in key}
    for task in own.results.tasks:
        assert any(task in key for key in routers), sorted(routers)
    before = own.checkpoint(1)["state_dict"]
    first = own.results.freezing[own.results.tasks[0]]
    for path, names in first.items():
        for name in names:
            kept = {key for key in before if key.startswith(f"model.{path}.lora_b.{name}")}
            assert kept and all(torch.equal(before[key], state[key]) for key in kept), path


def test_moelora_mixes_eight_experts(done: Callable[[str], Done]) -> None:
    own = done("moelora_llava7b")
    state = own.checkpoint(2)["state_dict"]
    assert {value.shape[0] for key, value in state.items() if ".routers." in key} == {8}
    assert len(own.results.modules["language"]) == LINEARS * LAYERS and "vision" not in own.results.modules
    assert not own.results.freezing and not own.results.allocation


def test_sequential_tunes_one_adapter_and_the_projector(done: Callable[[str], Done]) -> None:
    own = done("sequential_llava7b")
    assert {len(names) for names in own.results.modules["language"].values()} == {1}
    assert len(own.results.modules["language"]) == LINEARS * LAYERS and "vision" not in own.results.modules
    assert any("projector" in key for key in own.checkpoint(2)["state_dict"])
