"""Every registered strategy on DDP and FSDP2, with two and with four gloo processes, against one process.

The global batches are the same, and all answers of the smoke tasks have the same number of tokens, so the mean over ranks of
their mean losses is the mean over the whole batch: what remains is the rounding of sums in another order. Evaluation batches are
as uneven as they can be: some ranks have one more than others. Half of the rows of the second task have no image.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import STRICT, start_ranks, wait_for

from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run
from mcit_lightning.strategies import STRATEGIES

pytestmark = pytest.mark.slow

TASKS = ("colours", "counts")
ENGINES = ("fsdp2", "ddp")
WORLDS = (2, 4)
BATCH = 4
LEARNING_RATE = 1e-3
TOLERANCE = 1e-5
"""Largest difference of a weight, where Adam can move each by up to 6e-3 in the run."""
PREVIEW = (
    "callbacks=[{_target_: callbacks.TaskPreview}, {_target_: callbacks.Consolidate}, {_target_: callbacks.StageCost}, "
    "{_target_: callbacks.BackwardTransfer}, {_target_: callbacks.StageCheckpoint}]"
)
JOBS = {
    "sequential": ("smoke", "strategy.rank=4"),
    "joint": ("smoke", "strategy={name: joint, rank: 4}"),
    "individual": (
        "smoke",
        "strategy={name: individual, rank: 4, targets: {vision: [q_proj], language: [all-linear]}}",
    ),
    "zero_shot": ("smoke", "strategy={name: zero_shot}"),
    "moelora": (
        "smoke",
        "strategy={name: moelora, rank: 8, experts: 4, targets: {vision: [v_proj], language: [all-linear]}}",
    ),
    "branchlora": ("branchlora_smoke", "strategy.selector=learned_keys", "strategy.router_noise=0.0"),
    "dmole": ("dmole_smoke", "strategy.dropout=0.0"),
    **{name: ("smoke", f"strategy={{name: {name}, rank: 4}}") for name in ("lwf", "olora", "reglora", "hide", "disco")},
    "ewc": ("smoke", "strategy={name: ewc, rank: 4, samples: 6}"),
    "replay": ("smoke", "strategy={name: replay, rank: 4, buffer: 4}"),
    "modalprompt": ("smoke", "strategy={name: modalprompt, length: 3, top_k: 2}"),
    "keeplora": ("smoke", "strategy={name: keeplora, rank: 4}", PREVIEW),
    "smolora": ("smoke", "strategy={name: smolora, rank: 8, experts: 4}"),
    # the last step of an epoch has one sample: some processes have no part in it
    "mrlora": (
        "smoke",
        "strategy={name: mrlora, rank: 4, router_samples: 5, router_epochs: 2, router_batch_size: 3}",
        PREVIEW.replace("TaskPreview", "RouterTuning"),
    ),
}
"""Strategy -> experiment and overrides."""
NOT_COMPARED = ("zero_shot", "keeplora")
"""No weights; and weights that start at singular vectors, the last of which are rounding where a gradient has few directions."""
PAIRS = [(engine, name) for engine in ENGINES for name in JOBS if engine != "fsdp2" or STRATEGIES.get(name).shards]


def work(data: str, out: str, world: int, engine: str, only: tuple[str, ...] = tuple(JOBS)) -> None:
    """Run every strategy on an engine; in a process of its own, one per rank."""
    for name in only:
        if engine == "fsdp2" and not STRATEGIES.get(name).shards:
            continue
        experiment, *overrides = JOBS[name]
        settings = [
            f"data.root={data}",
            "prepare=null",
            f"out={out}/{engine}/{name}",
            f"order=[{','.join(TASKS)}]",
            f"trainer.devices={world}",
            f"trainer.strategy={engine}",
            f"data.batch_size={BATCH // world}",
            "data.group_by_length=false",
            "data.limit_train=12",
            "data.limit_val=5",
            "data.limit_test=6",
            "data.eval_batch_size=1",
            f"optim.lr={LEARNING_RATE}",
            f"optim.projector_lr={LEARNING_RATE}",
            "trainer.accelerator=cpu",
            "trainer.enable_progress_bar=false",
            *overrides,
        ]
        run(load_config(experiments_dir() / f"{experiment}.yaml", settings))


def drop_images(path: Path) -> None:
    """Make every second row of a file one without an image."""
    rows = json.loads(path.read_text())
    for row in rows[::2]:
        del row["image"]
        for turn in row.get("conversations", []):
            turn["value"] = turn["value"].replace("<image>\n", "")
    path.write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def runs(smoke_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the runs: `<world>/<engine>/<strategy>`."""
    root = tmp_path_factory.mktemp("engines")
    data = root / "data"
    shutil.copytree(smoke_root, data)
    for split in ("train", "val", "test"):
        drop_images(data / TASKS[1] / f"{split}.json")
    work(str(data), str(root / "1"), 1, "auto")
    for world in WORLDS:
        for engine in ENGINES:
            code = (
                f"import {__name__} as test; test.work({str(data)!r}, {str(root / str(world))!r}, {world}, {engine!r})"
            )
            wait_for(start_ranks(code, world, root, **STRICT if engine == "fsdp2" else {}), 900)
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Stage and name -> tensor, of every final checkpoint."""
    found = {}
    for path in sorted(run.glob("stage_*/final.ckpt")):
        for name, value in torch.load(path, weights_only=True)["state_dict"].items():
            found[f"{path.parent.name}/{name}"] = value
    return found


def structure(run: Path) -> list[object]:
    """The structure log after the last stage, without the numbers that it was decided by."""
    path = max(run.glob("stage_*/final.ckpt"))
    entries = torch.load(path, weights_only=True)["mcit"]["structure"]
    return [(entry["kind"], entry["stage"], entry.get("ranks"), entry.get("branches")) for entry in entries]


@pytest.mark.parametrize("name", [name for name in JOBS if not STRATEGIES.get(name).shards])
def test_what_cannot_be_sharded_is_refused(name: str) -> None:
    experiment, *overrides = JOBS[name]
    with pytest.raises(ValueError, match=f"'fsdp2' is refused: strategy '{name}'"):
        load_config(
            experiments_dir() / f"{experiment}.yaml", [*overrides, "trainer.strategy=fsdp2", "trainer.devices=2"]
        )


def test_all_registered_strategies_are_here() -> None:
    assert set(JOBS) == set(STRATEGIES)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("engine", "strategy"), [pair for pair in PAIRS if pair[1] not in NOT_COMPARED])
def test_several_processes_learn_what_one_learns(runs: Path, strategy: str, engine: str, world: int) -> None:
    one, several = runs / "1/auto" / strategy, runs / str(world) / engine / strategy
    assert structure(one) == structure(several)
    expected, found = weights(one), weights(several)
    assert expected.keys() == found.keys() and len(expected) > 20
    worst = {
        name: float((value.float() - found[name].float()).abs().max())
        for name, value in expected.items()
        if value.numel()
    }
    name = max(worst, key=worst.__getitem__)
    assert worst[name] < TOLERANCE, name


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize(("engine", "strategy"), PAIRS)
def test_each_sample_is_evaluated_once_and_scored_as_in_one_process(
    runs: Path, strategy: str, engine: str, world: int
) -> None:
    one, several = runs / "1/auto" / strategy, runs / str(world) / engine / strategy
    files = sorted(path.relative_to(one) for path in one.glob("predictions/**/*.jsonl"))
    assert len(files) >= 2
    for file in files:
        expected, found = ({row["index"]: row for row in rows(folder / file)} for folder in (one, several))
        assert len(rows(several / file)) == len(found) == 6 and expected.keys() == found.keys()
        assert [found[i].get("routed_to") for i in expected] == [row.get("routed_to") for row in expected.values()]
        same = [found[index]["text"] == row["text"] for index, row in expected.items()]
        assert sum(same) >= 5, file  # a random model has ties between tokens
    assert json.loads((several / "results.json").read_text())["strategy"] == strategy


def rows(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
