"""The page on adding a strategy: its method is registered, its test passes, and a run with it works."""

import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from stage_steps import Make
from test_strategies import callbacks

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.runner import run
from mcit_lightning.strategies import STRATEGIES, ContinualStrategy

PAGE = Path(__file__).parent.parent / "docs" / "adding-a-strategy.md"
METHOD, TEST = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module", autouse=True)
def wise_ft(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The page's file, imported as a user's would be."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "wise_ft.py").write_text(METHOD, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        import_module("wise_ft")


def test_the_pages_test_passes(steps: Make) -> None:
    names: dict[str, Any] = {}
    exec(compile(TEST, str(PAGE), "exec"), names)
    tests = [value for name, value in names.items() if name.startswith("test_")]
    assert len(tests) == 1
    tests[0](steps)


def test_a_run_with_it(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    config = experiment(
        tmp_path / "run",
        "imports=[wise_ft]",
        "strategy={name: wise_ft, coefficient: 0.3}",
        "order=[colours, shapes]",
        callbacks("wise_ft"),
    )
    results = run(config)
    assert results.strategy == "wise_ft" and results.matrix.filled_rows() == [0, 1]


def test_every_hook_of_the_contract_is_on_the_page() -> None:
    page = PAGE.read_text(encoding="utf-8")
    hooks = {
        name
        for name in vars(ContinualStrategy)
        if not name.startswith("_") and callable(getattr(ContinualStrategy, name))
    }
    explained = {"check", "required_callbacks", "router_samples", "features", "fit_router", "Config"}
    assert {name for name in hooks - explained if f"`{name}`" not in page} == set()


def test_every_strategy_of_the_package_has_a_row_and_an_experiment() -> None:
    from mcit_lightning.loading import experiments_dir, load_config

    rows = (PAGE.parent / "strategies.md").read_text(encoding="utf-8")
    own = [name for name in STRATEGIES if STRATEGIES.get(name).__module__.startswith("mcit_lightning.strategies.")]
    references = {"sequential", "joint", "individual", "zero_shot"}
    assert [name for name in own if f"| [`{name}`](#" not in rows] == []
    used = {load_config(path).strategy["name"] for path in experiments_dir().glob("*quickstart.yaml")}
    assert set(own) - references <= used
