"""Finding and grouping runs: what is averaged, what is kept apart, and what is refused."""

import json
import logging
from pathlib import Path

import pytest
import yaml
from comparison_runs import TASKS, make_run, make_sweep

from mcit_lightning.__main__ import main
from mcit_lightning.comparison.find import find_runs
from mcit_lightning.comparison.grouping import compare_runs


def test_a_sweep_folder_gives_methods_seeds_and_orders(tmp_path: Path) -> None:
    make_sweep(tmp_path, seeds=2, orders=2)
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({"runs": {"joint": {}, "dmole": {}}}, sort_keys=False))
    comparison = compare_runs(*find_runs([tmp_path]))
    assert comparison.names == ["joint", "dmole", "branchlora", "sequential"], "the plan's order, then natural order"
    assert [group.tasks for group in comparison.groups] == [list(TASKS), list(TASKS[::-1])]
    for group in comparison.groups:
        assert [method.seeds for method in group.methods] == [[0, 1]] * 4
    first, second = comparison.groups
    assert {m.name: m.style for m in first.methods} == {m.name: m.style for m in second.methods}
    assert any("nothing is averaged over orders" in notice for notice in comparison.notices)
    assert comparison.reference == "sequential"


def test_means_by_hand(tmp_path: Path) -> None:
    """Final scores of a run with seed s: 60 + s - 40, 60 + s - 20 and 60 + s, mean 40 + s."""
    comparison = compare_runs(find_runs([make_run(tmp_path / f"m/seed{seed}", seed=seed) for seed in range(3)])[0])
    (group,) = comparison.groups
    (method,) = group.methods
    final = method.summary("MFN")
    assert final is not None and final.values == (40.0, 41.0, 42.0) and final.mean == 41.0 and final.deviation == 1.0
    backward = method.summary("BWT")
    assert backward is not None and backward.mean == -30.0


def test_single_runs_are_named_by_their_folders(tmp_path: Path) -> None:
    one, two = make_run(tmp_path / "one"), make_run(tmp_path / "two/seed3", seed=3)
    assert [run.name for run in find_runs([one, two, one])[0]] == ["one", "two"]


def test_other_settings_under_one_name_are_kept_apart(tmp_path: Path) -> None:
    make_run(tmp_path / "a/m/seed0")
    make_run(tmp_path / "b/m/seed1", seed=1, settings={"strategy": {"name": "sequential", "rank": 8}})
    comparison = compare_runs(find_runs([tmp_path / "a/m/seed0", tmp_path / "b/m/seed1"])[0])
    assert comparison.names == ["m", "m (2)"]
    assert any("strategy.rank: 4 and 8" in notice for notice in comparison.notices)


def test_runs_of_two_machines_are_one_method(tmp_path: Path) -> None:
    for seed, root in enumerate(("there", "elsewhere/data")):
        settings = {"data": {"root": root, "limit_train": 9}, "backbone": {"id": f"{root}/model"}}
        make_run(tmp_path / f"m/seed{seed}", seed=seed, settings=settings)
    comparison = compare_runs(*find_runs([tmp_path]))
    assert comparison.names == ["m"] and comparison.settings == {}


def test_what_else_differs_between_methods_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", strategy="ewc", settings={"data": {"limit_train": 200}})
    comparison = compare_runs(find_runs([tmp_path / "a", tmp_path / "b"])[0])
    assert comparison.settings == {"data.limit_train": {"a": 100, "b": 200}}
    assert any("data.limit_train" in notice for notice in comparison.notices)


def test_seeds_that_are_missing_are_said(tmp_path: Path) -> None:
    for seed in range(3):
        make_run(tmp_path / f"a/seed{seed}", seed=seed)
    make_run(tmp_path / "b/seed0", strategy="ewc")
    notices = compare_runs(*find_runs([tmp_path])).notices
    assert any("different numbers of seeds: a 3, b 1" in notice for notice in notices)
    assert any("Fewer than three seeds of b" in notice for notice in notices)


def test_other_task_sets_are_kept_apart_and_said(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", tasks=("digits", "charts"))
    comparison = compare_runs(*find_runs([tmp_path]))
    assert len(comparison.groups) == 2
    assert any("2 different task sets, which do not compare" in notice for notice in comparison.notices)


def test_unfinished_runs_are_left_out_and_named(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", finished=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/state.json").write_text(json.dumps({"finished": False}))
    comparison = compare_runs(*find_runs([tmp_path]))
    assert comparison.names == ["a"]
    (notice,) = [notice for notice in comparison.notices if "Left out" in notice]
    assert f"{tmp_path / 'b'} (not finished, 3 stages are)" in notice and f"{tmp_path / 'c'} (nothing was" in notice


@pytest.mark.parametrize(
    ("paths", "wanted"),
    [
        (["none", "good"], "no such folder"),
        (["empty", "good"], "is no run directory, and there is none in it"),
        (["begun", "begun2"], "no run is finished"),
        (["good", "copy"], "both good with seed 0"),
        (["damaged", "good"], "results.json is damaged"),
        (["answers", "good"], "answers: its predictions of digits are not as a run writes them"),
        (["good", "other", "--reference", "othr"], "Did you mean 'other'?"),
        (["good", "other", "--out", "good"], "is the directory of a run"),
        (["good", "--out", "x"], "are for a comparison"),
    ],
)
def test_bad_input_is_one_error_and_nothing_is_written(
    paths: list[str], wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(Path("good"))
    make_run(Path("other"), strategy="ewc")
    make_run(Path("copy/good"))
    make_run(Path("begun"), finished=False)
    make_run(Path("begun2"), finished=False)
    (make_run(Path("damaged")) / "results.json").write_text("{")
    (make_run(Path("answers")) / "predictions/stage_01/digits.jsonl").write_text('{"index": 0}\n')
    Path("empty").mkdir()
    before = sorted(path for path in tmp_path.rglob("*"))
    assert main(["report", *(f"copy/{p[:0]}good" if p == "copy" else p for p in paths)]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 1 and wanted in errors[0]
    assert sorted(path for path in tmp_path.rglob("*")) == before
