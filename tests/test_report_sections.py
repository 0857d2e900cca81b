"""The report's parts on routing and cost."""

import re
from pathlib import Path

from mcit_lightning.evaluation.report import write_report
from mcit_lightning.evaluation.report_cost import OPTIONAL
from mcit_lightning.evaluation.results import Results

TASKS = ["a", "b", "c"]


def new_results(stages: int = 2) -> Results:
    results = Results("exp", "dmole", "tiny", 0, list(TASKS), dict.fromkeys(TASKS, "exact_match"))
    for row, task in enumerate(TASKS[:stages]):
        results.matrix.set(row, task, 50.0)
        results.cost_row(task, f"stage_{row + 1:02d}", row).train_seconds = 10.0
    return results


def section_of(results: Results, root: Path, heading: str) -> str:
    """The HTML of a section, empty if the page has none of that heading."""
    page = write_report(root, results, "").read_text(encoding="utf-8")
    return next((part for part in page.split("<section>") if part.startswith(f"<h2>{heading}</h2>")), "")


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", html)


def routed(results: Results) -> Results:
    """After the second of three stages, the third task's samples are rejected or sent to the first."""
    results.routing = {
        "accuracy": 75.0,
        "among": 87.5,
        "confusion": {"a": {"a": 3, "none": 1}, "b": {"b": 3, "a": 1}, "c": {"a": 1, "none": 3}},
        "rejected": {"a": 25.0, "b": 0.0, "c": 75.0},
        "experts": {"a": 1.5, "b": 2.0, "c": 0.25},
        "per_stage": {"a": 100.0, "b": 75.0},
        "rejected_per_stage": {"a": {"a": 0.0, "b": 100.0, "c": 60.0}, "b": {"a": 25.0, "b": 0.0, "c": 75.0}},
    }
    return results


def test_routing_shows_confusion_rejections_and_the_way_there(tmp_path: Path) -> None:
    html = section_of(routed(new_results()), tmp_path, "Routing")
    confusion, over_stages, rejected = re.split(r"<h3>[^<]*</h3>", html)
    assert re.findall(r'<th scope="col"><span>([^<]*)', confusion) == ["a", "b", "None (pretrained)"]
    assert cells(confusion) == ["75.0", "", "25.0", "25.0", "75.0", "", "25.0", "", "75.0"]
    assert "Right for 75.0 %" in confusion and "used for 87.5 %" in confusion and "used 1.25 tasks" in confusion
    wide = over_stages[: over_stages.index('<div class="narrow">')]
    assert re.findall(r"<title>([^<]*)</title>", wide) == [
        "Right, after stage 1 (a): 100.0",
        "Right, after stage 2 (b): 75.0",
        "Rejected: old, after stage 1 (a): 0.0",
        "Rejected: old, after stage 2 (b): 12.5",
        "Rejected: new, after stage 1 (a): 80.0",
        "Rejected: new, after stage 2 (b): 75.0",
    ]
    assert cells(rejected) == ["0.0", "100.0", "60.0", "25.0", "0.0", "75.0"]
    assert re.findall(r'<td class="own"[^>]*>([^<]*)', rejected) == ["0.0", "0.0"]
    assert "not learnt yet" in rejected


def test_a_router_that_rejects_nothing_says_so_in_a_sentence(tmp_path: Path) -> None:
    results = routed(new_results())
    assert results.routing
    results.routing["rejected_per_stage"] = {"a": {"a": 0.0}, "b": {"a": 0.0, "b": 0.0}}
    html = section_of(results, tmp_path, "Routing")
    assert "No sample, after any stage." in html and "Rejected: old" not in html
    results.routing["rejected_per_stage"]["b"]["a"] = 10.0
    html = section_of(results, tmp_path, "Routing")
    assert "All of these tasks were learnt" in html and "Rejected: new, after" not in html


def test_routing_of_an_older_file_and_of_no_router(tmp_path: Path) -> None:
    results = new_results()
    assert section_of(results, tmp_path, "Routing") == ""
    results.routing = {"accuracy": None, "confusion": {"c": {"a": 2}}}
    html = section_of(results, tmp_path, "Routing")
    assert "Right for – %" in html and cells(html) == ["100.0"] and "<h3>" not in html


def test_cost_has_a_column_where_any_stage_has_a_value(tmp_path: Path) -> None:
    results = new_results()
    html = section_of(results, tmp_path, "Cost")
    assert not [name for name in OPTIONAL if f'<th scope="col">{name}</th>' in html]
    assert len(cells(html)) == 2 * 7
    first, second = results.cost
    first.proxy_seconds, second.router_seconds = 34.2, 0.05
    first.routing_seconds_per_sample = second.routing_seconds_per_sample = 0.025
    first.generation_seconds_per_sample, second.generation_seconds_per_sample = 0.075, None
    first.first_routing_seconds_per_sample, first.train_seconds = 0.3, 1000.0
    html = section_of(results, tmp_path, "Cost")  # there is no router whose time would mean something
    assert "Routing per sample" not in html and "Generation per sample" in html
    html = section_of(routed(results), tmp_path, "Cost")
    _, training, evaluation = re.split(r"<h3>[^<]*</h3>", html)
    assert [(row["Probe"], row["Router"]) for row in rows_of(training)] == [
        ("34.2 s (3.4 %)", "–"),
        ("–", "50 ms (0.5 %)"),
    ]
    assert [row["Routing per sample"] for row in rows_of(evaluation)] == ["25 ms (25 %)", "25 ms"]
    assert [row["First time"] for row in rows_of(evaluation)] == ["0.3 s (80 %)", "–"]
    assert [row["Generation per sample"] for row in rows_of(evaluation)] == ["75 ms", "–"]


def rows_of(table: str) -> list[dict[str, str]]:
    """Rows of a table, heading -> text, without the name of the row."""
    heads = re.findall(r'<th scope="col">([^<]*)</th>', table)[1:]
    return [dict(zip(heads, cells(row), strict=True)) for row in table.split("<tr>")[2:]]
