"""What a sweep is going to run: cells, orders, strategies by name, plan files, and every way to get them wrong."""

from pathlib import Path

import pytest
import yaml

from mcit_lightning.__main__ import main
from mcit_lightning.commands.sweep import make_plan, parse_orders, parse_seeds
from mcit_lightning.sweep.orders import permutations

ROOT = Path(__file__).resolve().parent.parent


def cells(source: str, *settings: str, out: Path = Path("out")) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Folder below `out` -> experiment and overrides."""
    plan, own = make_plan(source, settings)
    only = [name for name in own.get("only", "").split(",") if name]
    return {str(c.folder.relative_to(out)): (c.experiment, c.overrides) for c in plan.cells(out, only)}


def test_permutations_begin_with_the_own_order_and_only_grow() -> None:
    order = ["a", "b", "c", "d"]
    six = permutations(order, 6)
    assert six[0] == order and len({tuple(one) for one in six}) == 6 and permutations(order, 3) == six[:3]
    assert all(sorted(one) == order for one in six)
    other = permutations(["w", "x", "y", "z"], 6)
    names = dict(zip(order, ["w", "x", "y", "z"], strict=True))
    assert [[names[task] for task in one] for one in six] == other, "lists of equal length are permuted alike"
    assert len(permutations(["a", "b", "c"], 6)) == 6
    with pytest.raises(ValueError, match="3 tasks have 6 orders"):
        permutations(["a", "b", "c"], 7)


def test_an_experiment_is_one_run_with_three_seeds() -> None:
    found = cells("smoke", "data.limit_train=8")
    assert list(found) == ["smoke/seed0", "smoke/seed1", "smoke/seed2"]
    assert found["smoke/seed1"] == ("smoke", ("data.limit_train=8", "seed=1"))


def test_cells_go_seed_by_seed_through_orders_and_runs() -> None:
    found = cells("smoke", "strategies=sequential,joint", "seeds=0,5", "orders=2")
    names = ["sequential/seed0", "joint/seed0", "sequential/order2/seed0", "joint/order2/seed0"]
    assert list(found) == [*names, *(name.replace("seed0", "seed5") for name in names)]
    assert not any(override.startswith("order=") for override in found["joint/seed0"][1]), "the experiment's own"
    second = [override for override in found["joint/order2/seed0"][1] if override.startswith("order=")]
    assert second == ["order=[colours,counts,shapes]"]


def test_strategies_take_their_own_experiment_where_there_is_one() -> None:
    found = cells("smoke", "strategies=sequential,dmole,branchlora,moelora", "seeds=0", "moelora:strategy.experts=2")
    assert {folder: experiment for folder, (experiment, _) in found.items()} == {
        "sequential/seed0": "smoke",
        "dmole/seed0": "dmole_smoke",
        "branchlora/seed0": "branchlora_smoke",
        "moelora/seed0": "smoke",
    }
    assert found["moelora/seed0"][1] == ("strategy.name=moelora", "strategy.experts=2", "seed=0")
    assert found["dmole/seed0"][1] == ("seed=0",)


def test_the_own_strategy_in_an_experiments_name_is_no_part_of_the_stream() -> None:
    found = cells(
        "branchlora_quickstart", "strategies=branchlora,dmole,moelora,joint", "seeds=0", "joint:strategy={name: joint}"
    )
    assert [experiment for experiment, _ in found.values()] == [
        "branchlora_quickstart", "dmole_quickstart", "moelora_quickstart", "branchlora_quickstart",
    ]  # fmt: skip


def test_a_strategy_without_an_experiment_gets_the_callbacks_that_it_needs(tmp_path: Path) -> None:
    """An experiment outside of the package, on which nobody has put D-MoLE yet."""
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": str(ROOT / "experiments/smoke.yaml"), "name": "mine"}))
    plan, _ = make_plan(str(path), ["strategies=dmole,sequential", "seeds=0"])
    dmole, plain = (cell.config() for cell in plan.cells(tmp_path / "out"))
    assert {node["_target_"] for node in dmole.callbacks} >= {"callbacks.GradientProbe", "callbacks.BudgetReallocation"}
    assert dmole.strategy["name"] == "dmole" and not dmole.backbone.train_projector
    assert plain.strategy["name"] == "sequential" and plain.backbone.train_projector


def test_a_plan_file_with_its_own_seeds_and_orders(tmp_path: Path) -> None:
    plan = {
        "common": ["data.limit_train=8"],
        "runs": {"b": {"experiment": "smoke"}, "a": {"experiment": "dmole_smoke", "overrides": ["strategy.rank=2"]}},
        "seeds": [4],
        "orders": [["shapes", "colours"], ["colours", "shapes"]],
    }
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(plan, sort_keys=False))
    found = cells(str(path), "data.limit_test=2")
    assert list(found) == ["b/seed4", "a/seed4", "b/order2/seed4", "a/order2/seed4"]
    common = ("data.limit_train=8", "data.limit_test=2")
    assert found["a/seed4"] == ("dmole_smoke", (*common, "strategy.rank=2", "order=[shapes,colours]", "seed=4"))
    assert list(cells(str(path), "seeds=1", "orders=1", "only=a")) == ["a/seed1"]


@pytest.mark.parametrize("plan", sorted((ROOT / "benchmarks").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_plans_can_be_run(plan: Path) -> None:
    assert cells(str(plan), "seeds=0")


def test_seeds_and_orders_are_read() -> None:
    assert parse_seeds("0,1,5") == [0, 1, 5] and parse_seeds("[3]") == [3] and parse_seeds("2-4") == [2, 3, 4]
    assert parse_seeds([7, 8]) == [7, 8] and parse_orders(3) == 3 and parse_orders([["a"], ["b"]]) == [["a"], ["b"]]


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["smoke", "seeds=0,x"], "'x' is no whole number"),
        (["smoke", "seeds=1,1"], "each once"),
        (["smoke", "seeds="], "at least one seed"),
        (["smoke", "orders=0"], "must be a number of orders"),
        (["smoke", "orders=[a,b]"], "must be a number of orders"),
        (["smoke", "orders=[[colours],[colours]]"], "names an order twice"),
        (["smoke", "orders=[[colours],[shpes]]"], "no task 'shpes'. Did you mean 'shapes'?"),
        (["smoke", "orders=7"], "run 'smoke': orders=7: 3 tasks have 6 orders"),
        (["smoke", "seed=3"], "write seeds=3"),
        (["smoke", "order=[shapes]"], "write orders=[[shapes]]"),
        (["smoke", "strategies=joint,joint"], "names 'joint' twice"),
        (["smoke", "strategies=seqential"], "Did you mean 'sequential'?"),
        (["smoke", "strategies=moelora"], "run 'moelora'"),
        (["smoke", "smokee:optim.lr=1"], "no run 'smokee' in the sweep. Did you mean 'smoke'?"),
        (["smoke", "optim.lrr=1"], "Did you mean 'lr'?"),
        (["smoke", "word"], "write it as key=value"),
        (["smoke", "only=x"], "only: no run 'x'"),
        (["smoke", "--jobs", "2", "--gpus", "0,1,2"], "cannot be shared out evenly"),
        (["none"], "no experiment 'none'"),
    ],
)
def test_bad_input_is_one_error_before_anything_runs(
    arguments: list[str], wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["sweep", *arguments, f"out={tmp_path / 'out'}"]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and wanted in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ({"runs": {}}, "runs: must map names"),
        (
            {"runs": {"a": {"experiment": "smoke"}}, "seedz": [1]},
            "seedz: is no key of a sweep's plan. Did you mean 'seeds'?",
        ),
        ({"runs": {"a": {"experiment": "smoke", "override": []}}}, "Did you mean 'overrides'?"),
        ({"runs": {"a": {"overrides": []}}}, "runs.a: must be {experiment"),
        ({"runs": {"a/b": {"experiment": "smoke"}}}, "becomes the name of a folder"),
        ({"runs": {"a": {"experiment": "smoke", "overrides": "x=1"}}}, "must be a list of 'key=value'"),
        ({"runs": {"a": {"experiment": "smoke"}}, "common": {"x": 1}}, "common: must be a list"),
        ({"runs": {"a": {"experiment": "smok"}}}, "run 'a': no experiment 'smok'"),
    ],
)
def test_a_wrong_plan_is_one_error(
    content: dict[str, object], wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(content))
    assert main(["sweep", str(tmp_path / "plan.yaml"), f"out={tmp_path / 'out'}"]) == 2
    assert wanted in caplog.text and not (tmp_path / "out").exists()


def test_a_plan_names_its_runs_itself(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main(["sweep", str(ROOT / "benchmarks/small_stream.yaml"), "strategies=joint", f"out={tmp_path}"]) == 2
    assert "is a plan that names its runs" in caplog.text


def test_a_dry_run_lists_the_cells_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "smoke", "seeds=0,1", "dry_run=true", f"out={tmp_path / 'out'}"]) == 0
    shown = capsys.readouterr().out
    assert f"{tmp_path / 'out/smoke/seed1'}: smoke seed=1" in shown and "2 cells" in shown
    assert not (tmp_path / "out").exists()


def test_a_single_runs_folder_is_no_sweeps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "state.json").write_text("{}")
    assert main(["sweep", "smoke", f"out={tmp_path}"]) == 2
    assert "directory of a single run" in caplog.text
