"""The vision tower's outputs on the disk: same results, fewer passes, and no harm from damaged files or a full disk."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import start, start_ranks, wait_for
from smoke_runs import adapters, predictions, small_experiment
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from transformers import CLIPVisionModel

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.feature_cache import CachedTower, FeatureStore, picture_keys
from mcit_lightning.runner import run

TENSORS = {"last": torch.arange(6.0).reshape(2, 3), "layer-2": torch.ones(2, 3, dtype=torch.bfloat16)}


def test_what_was_put_is_got_back_in_its_type(tmp_path: Path) -> None:
    store = FeatureStore(tmp_path / "features", 2**20)
    assert store.get("aa00") == {}
    store.put("aa00", TENSORS)
    found = FeatureStore(tmp_path / "features", 2**20).get("aa00")
    assert found.keys() == TENSORS.keys()
    for name, value in TENSORS.items():
        assert torch.equal(found[name], value) and found[name].dtype == value.dtype
    store.clear()
    assert not (tmp_path / "features").exists()


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_a_damaged_file_is_computed_anew(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    store = FeatureStore(tmp_path, 2**20)
    store.put("aa00", TENSORS)
    (file,) = tmp_path.glob("*/*.st")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes({"cut": bytes(content[:40]), "flipped": bytes(content), "empty": b""}[damage])
    assert store.get("aa00") == {} and str(file) in caplog.text and not file.exists()


def test_nothing_is_written_beyond_the_limit_or_to_a_full_disk(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = FeatureStore(tmp_path / "a", 500)
    for key in ("aa", "bb", "cc", "dd"):
        store.put(key, TENSORS)
    assert 1 <= len(list((tmp_path / "a").glob("*/*"))) < 4 and size(tmp_path / "a") <= 500
    assert caplog.text.count("no more picture features") == 1 and "feature_cache_gb" in caplog.text
    (tmp_path / "b").write_text("a file where the folder should be")
    broken = FeatureStore(tmp_path / "b", 2**20)
    broken.put("aa", TENSORS)
    assert str(tmp_path / "b") in caplog.text


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_several_processes_stay_below_the_limit_together_also_when_they_come_back(tmp_path: Path) -> None:
    limit, keys = 2000, iter(f"{number:04x}" for number in range(100))
    for _ in range(3):
        stores = [FeatureStore(tmp_path, limit, 2) for _ in range(2)]
        before = size(tmp_path)
        for store in stores:
            store.put(next(keys), TENSORS)
        assert (
            before < size(tmp_path) <= limit
        )  # what is left is shared, and not what one process has filled lost to both
    for store in stores:
        for _ in range(20):
            store.put(next(keys), TENSORS)
    assert size(tmp_path) <= limit


def test_two_processes_may_write_the_same_picture(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from pathlib import Path; from mcit_lightning.feature_cache import FeatureStore\n"
        f"store = FeatureStore(Path({str(tmp_path / 'features')!r}), 2**24, 2)\n"
        "for turn in range(60):\n"
        "    for number in range(3):\n"
        "        found = store.get(f'aa{number}')\n"
        "        assert not found or bool((found['last'] == number).all()), found\n"
        "        store.put(f'aa{number}', {'last': torch.full((4000,), float(number))})\n"
    )
    processes = [start([sys.executable, "-c", code], tmp_path) for _ in range(2)]
    wait_for(processes, 300)
    assert not any("damaged" in each.output() for each in processes)
    assert sorted(path.name for path in (tmp_path / "features/aa").iterdir()) == ["aa0.st", "aa1.st", "aa2.st"]


def test_keys_tell_pictures_and_preprocessing_apart() -> None:
    pictures = torch.rand(3, 3, 4, 4)
    pictures[2] = pictures[0]
    keys = picture_keys({"pixel_values": pictures})
    assert keys is not None and keys[0] == keys[2] != keys[1]
    assert keys != picture_keys({"pixel_values": pictures * 2})
    assert picture_keys({}) is None and picture_keys({"pixel_values": pictures[None]}) is None


class Tower(nn.Module):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)
        self.config = type("Config", (), {"num_hidden_layers": 2})()
        self.seen: list[int] = []

    def forward(self, pixel_values: torch.Tensor, output_hidden_states: Any = None) -> Any:
        self.seen.append(len(pixel_values))
        hidden = [pixel_values.flatten(2).mean(-1, keepdim=True) + layer for layer in range(3)]
        return type("Output", (), {"last_hidden_state": 10 * hidden[2], "hidden_states": tuple(hidden)})()


def test_only_pictures_that_are_not_kept_run_through_the_tower(tmp_path: Path) -> None:
    tower = Tower()
    cached = CachedTower(tower, FeatureStore(tmp_path, 2**20), [-2])
    pixels = torch.rand(4, 3, 2, 2)
    keys = picture_keys({"pixel_values": pixels})
    assert keys is not None
    expected = tower(pixels).hidden_states[-2]
    tower.seen.clear()
    for rows, passes in (([0, 1], [2]), ([1, 2, 0], [1]), ([2, 1], [])):
        with cached.pictures([keys[row] for row in rows]):
            hidden = cached(pixels[rows], output_hidden_states=-2).hidden_states[-2]
        assert torch.equal(hidden, expected[rows]) and tower.seen == passes
        tower.seen.clear()
    with cached.pictures(keys[:2]):  # another output of the same pictures
        assert torch.equal(cached(pixels[:2]).last_hidden_state, tower(pixels[:2]).last_hidden_state)
        tower.seen.clear()
        assert torch.equal(cached(pixels[:2], output_hidden_states=-2).hidden_states[-2], expected[:2])
    cached(pixels)  # outside of the context
    assert tower.seen == [4]


def answers(root: Path) -> dict[str, list[tuple[str, float]]]:
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in predictions(root).items()}
    return {name: [(row["text"], row["score"]) for row in found] for name, found in rows.items()}


def test_a_run_with_the_cache_gives_the_same_results(
    experiment: Callable[..., ExperimentConfig], uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[int] = []
    clear = FeatureStore.clear

    def count_and_clear(self: FeatureStore) -> None:
        kept.append(len(list(self.folder.glob("*/*.st"))))
        clear(self)

    monkeypatch.setattr(FeatureStore, "clear", count_and_clear)
    run(experiment(tmp_path / "run", "data.feature_cache=always"))
    assert kept == [
        3 * 4 + 3 * 4 + 2 * 16
    ]  # test and validation rows, and the training rows of two tasks with two epochs
    assert answers(tmp_path / "run") == answers(uninterrupted)
    for stage, weights in adapters(uninterrupted).items():
        for name, value in adapters(tmp_path / "run")[stage].items():
            torch.testing.assert_close(value, weights[name], atol=1e-4, rtol=1e-3)
    assert not (tmp_path / "run/features").exists()


def run_two(data: str, out: str, cache: str, check: str) -> None:
    """A run of two processes that counts what is kept when it ends; in a process of its own, one per rank."""
    clear = FeatureStore.clear

    def look_and_clear(store: FeatureStore) -> None:
        files = sorted(store.folder.rglob("*.st"))
        whole = all(store.get(file.stem) for file in files)
        left = [file.name for file in store.folder.rglob("*.tmp")]
        Path(check).write_text(
            json.dumps({"files": len(files), "whole": whole, "left": left, "size": size(store.folder)})
        )
        clear(store)

    FeatureStore.clear = look_and_clear  # type: ignore[method-assign]
    run(small_experiment(Path(data), Path(out), "trainer.devices=2", "data.batch_size=2", *cache.split()))


@pytest.mark.slow
def test_two_processes_with_the_cache_give_the_same_results(smoke_root: Path, tmp_path: Path) -> None:
    full = "data.feature_cache=always"
    for name, cache in (("without", ""), ("with", full), ("little", f"{full} data.feature_cache_gb=2.0e-5")):
        arguments = [str(smoke_root), str(tmp_path / name), cache, str(tmp_path / f"{name}.json")]
        code = f"import {__name__} as test; test.run_two(*{arguments!r})"
        started = start_ranks(code, 2, tmp_path)
        wait_for(started, 900)
        if cache:
            assert not any("damaged" in each.output() for each in started)
            assert answers(tmp_path / name) == answers(tmp_path / "without")
            for stage, weights in adapters(tmp_path / "without").items():
                for key, value in adapters(tmp_path / name)[stage].items():
                    torch.testing.assert_close(value, weights[key], atol=1e-4, rtol=1e-3)
            assert not (tmp_path / name / "features").exists()
    kept, little = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("with", "little"))
    # test and validation rows, and the training rows of two tasks with two epochs, each once whoever has seen it first
    assert kept["files"] == 3 * 4 + 3 * 4 + 2 * 16 and kept["whole"] and not kept["left"]
    assert (
        0 < little["files"] < kept["files"]
        and little["size"] <= 2e-5 * 2**30
        and little["whole"]
        and not little["left"]
    )


def test_a_tower_that_adapts_is_not_cached(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    adapted = "strategy={name: sequential, targets: {vision: [all-linear]}}"
    with pytest.raises(ValueError, match=r"data\.feature_cache: is 'always', but the strategy adapts the vision tower"):
        run(experiment(tmp_path / "run", adapted, "data.feature_cache=always"))


def test_a_batch_runs_through_the_tower_once_whatever_is_read_of_it() -> None:
    tower = Tower()
    cached = CachedTower(tower, None, [-2], last=True)
    pixels = torch.rand(2, 3, 2, 2)
    expected = tower(pixels)
    tower.seen.clear()
    for number in (1, 2):  # batches
        with cached.pictures():
            assert torch.equal(cached(pixels).last_hidden_state, expected.last_hidden_state)
            assert torch.equal(cached(pixels, output_hidden_states=-2).hidden_states[-2], expected.hidden_states[-2])
            assert tower.seen == [2] * number
    with cached.pictures():  # other pictures are not taken for these
        assert torch.equal(cached(1 - pixels).last_hidden_state, tower(1 - pixels).last_hidden_state)
        assert torch.equal(cached(pixels).last_hidden_state, expected.last_hidden_state)


def test_keys_and_model_share_a_pass(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    passed: list[int] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, CLIPVisionModel):
            passed.append(len(output.last_hidden_state))

    hook = register_module_forward_hook(note)
    try:
        strategy = "strategy={name: branchlora, rank: 8, experts: 4, freeze_branches: false}"
        run(experiment(tmp_path / "run", strategy, "order=[colours]", "zero_shot=false"))
    finally:
        hook.remove()
    epochs, rows = 2, {"train": 16, "val": 4}
    assert sum(passed) == epochs * sum(rows.values()) + 4  # and the test rows
