"""What the benchmarks make of their samples, without measuring anything."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import bench

    return bench


def test_ratios_are_taken_within_a_round(bench: ModuleType) -> None:
    samples = {"new": [2.0, 30.0, 4.0], "old": [1.0, 10.0, 4.0]}
    row = bench.ratio_row("new", "old", samples, target="<= 1.5")
    assert (row.ratio, row.low, row.high, row.value, row.met) == (2.0, 1.0, 3.0, 4.0, False)
    faster = bench.ratio_row("old", "new", samples, invert=True, target=">= 2")
    assert (faster.ratio, faster.met) == (2.0, True)
    assert bench.ratio_row("new", "old", samples).met is None


def test_every_variant_runs_once_a_round(bench: ModuleType) -> None:
    from ratios import in_turn

    order: list[str] = []
    found = in_turn({name: lambda name=name: float(order.append(name) or len(order)) for name in "ab"}, 2)  # type: ignore[misc,func-returns-value]
    assert order == ["a", "b", "b", "a"] and found == {"a": [1.0, 4.0], "b": [2.0, 3.0]}


def test_the_table_goes_between_the_markers(bench: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.BEGIN}\nold\n{bench.END}\nafter\n")
    rows = [bench.Row("a step", "a loop", 1.02, 1.0, 1.1, target="<= 1.05"), bench.Row("b", "c", 2.0, 2.0, 2.0)]
    rows.append(bench.Row("slow", "c", 1.2, 1.1, 1.3, target="<= 1.15"))
    (tmp_path / "growth.json").write_text(json.dumps({"rows": [asdict(row) for row in rows]}))
    found = {"growth": bench.rows_of(tmp_path / "growth.json")}
    for _ in range(2):  # again gives the same page
        bench.write_page(page, found, argparse.Namespace(cpu_time=True, out=tmp_path))
    text = page.read_text()
    assert text.startswith("before\n<!-- bench: begin -->\n") and text.endswith("<!-- bench: end -->\nafter\n")
    assert "| a step | a loop | 1.02 (1.00 to 1.10) | <= 1.05: met |" in text and "CPU time" in text
    assert "| slow | c | 1.20 (1.10 to 1.30) | <= 1.15: **missed** |" in text and "old" not in text


def test_the_shipped_page_has_the_markers(bench: ModuleType) -> None:
    text = bench.PAGE.read_text()
    assert text.count(bench.BEGIN) == text.count(bench.END) == 1
    assert all((ROOT / "benchmarks" / f"{name}.py").is_file() for name in bench.BENCHMARKS)
