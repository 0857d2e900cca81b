"""Where experts went and which branches froze: the grids, the report's sections and the picture for TensorBoard."""

import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks.transfer import _enter_structure
from mcit_lightning.evaluation.figures import SLOT, placement_image
from mcit_lightning.evaluation.module_map import SMALLEST, Cell, draw_map
from mcit_lightning.evaluation.placement import Branch, Expert, branches, experts, times_chosen, tower_modules
from mcit_lightning.evaluation.report import write_report
from mcit_lightning.evaluation.results import Results
from mcit_lightning.loggers import StageTensorBoardLogger
from mcit_lightning.plans import FreezeRecord, StructureLog, TaskPlan

TASKS = ["a<b", "later"]
VISION = "model.vision_tower.encoder.layers."
LANGUAGE = "model.language_model.layers."


def new_results() -> Results:
    results = Results("exp", "dmole", "tiny", 0, list(TASKS), dict.fromkeys(TASKS, "exact_match"))
    results.matrix.set(0, TASKS[0], 50.0)
    return results


def with_budget() -> Results:
    """Layers 2 and 10 of the language model with two modules each, one module in the vision tower."""
    results = new_results()
    language = [f"{LANGUAGE}{layer}.attn.{kind}" for layer in (10, 2) for kind in ("v", "q")]
    results.modules = {"vision": {f"{VISION}0.q": []}, "language": {path: [] for path in language}}
    score = dict(zip(language, (4.0, 3.0, 2.0, 1.0), strict=True)) | {f"{VISION}0.q": 0.25}
    results.allocation["a<b"] = {
        "ratios": {"vision": 0.03, "language": 0.97},
        "ranks": {f"{VISION}0.q": 4, f"{LANGUAGE}10.attn.v": 4, f"{LANGUAGE}10.attn.q": 4},
        "budget": {"vision": 1, "language": 2},
        "difficulty": {"vision": 0.25, "language": 5.4772},
        "scores": score,
    }
    results.allocation["later"] = {
        "ratios": {"vision": 0.4, "language": 0.6},
        "ranks": {f"{LANGUAGE}10.attn.v": 4, f"{LANGUAGE}2.attn.q": 4},
        "budget": {"vision": 0, "language": 2},
        "difficulty": {},
        "scores": {},
    }
    return results


def with_frozen() -> Results:
    results = new_results()
    path = f"{LANGUAGE}0.attn.q"
    results.modules = {"language": {path: ["e0", "e1", "e2"]}}
    results.freezing = {"a<b": {path: ["e1"]}, "later": {path: ["e1", "e2"]}}
    return results


def page_of(results: Results, root: Path) -> str:
    return write_report(root, results, "").read_text(encoding="utf-8")


def titles(page: str) -> list[str]:
    return re.findall(r"<title>([^<]*)</title>", page)


def test_modules_are_in_natural_order_and_grouped_by_layer() -> None:
    vision, language = tower_modules(with_budget())
    assert language.layers == [
        ("2", [f"{LANGUAGE}2.attn.q", f"{LANGUAGE}2.attn.v"]),
        ("10", [f"{LANGUAGE}10.attn.q", f"{LANGUAGE}10.attn.v"]),
    ]
    assert (vision.prefix, language.prefix, language.kinds()) == (VISION, LANGUAGE, ["q", "v"])
    assert language.short(f"{LANGUAGE}2.attn.q") == "2.attn.q"


def test_decisions_and_how_often_a_module_was_chosen() -> None:
    results = with_budget()
    language = tower_modules(results)[1]
    first, second = experts(results, language).values()
    assert list(first.values()) == [Expert(None, 1.0, 4), Expert(None, 2.0, 3), Expert(4, 3.0, 2), Expert(4, 4.0, 1)]
    assert [expert.rank for expert in second.values()] == [4, None, None, 4]
    assert all(expert.score is None and expert.place is None for expert in second.values())
    assert times_chosen(results)[f"{LANGUAGE}10.attn.v"] == 2 and times_chosen(results)[f"{LANGUAGE}2.attn.v"] == 0


def test_the_page_shows_the_split_and_every_module_of_every_stage(tmp_path: Path) -> None:
    page = page_of(with_budget(), tmp_path)
    assert "<h2>Budget</h2>" in page and "<h2>Frozen branches</h2>" not in page
    row = page[page.index('<div class="stacks"') :]
    assert re.findall(r"flex-grow:([\d.]+)", row)[:4] == ["0.0300", "0.9700", "0.3333", "0.6667"]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row)[:6] == ["3.0 %", "1", "0.250", "97.0 %", "2", "5.48"]
    found = titles(page)
    assert "10.attn.q, a&lt;b: rank 4, score 3.00 (place 2 of 4)" in found
    assert "2.attn.q, a&lt;b: no expert, score 1.00 (place 4 of 4)" in found
    assert "2.attn.q, later: rank 4" in found and "2.attn.v, later: no expert" in found
    assert "10.attn.v: chosen in 2 of 2" in found and "2.attn.v: chosen in 0 of 2" in found
    assert len([title for title in found if ", later: " in title]) == 5
    assert page.count('<rect class="cell vision"') == 1 + 1 and page.count('<rect class="cell language"') == 2 + 2 + 4
    assert "4 of 4" in page and "a<b" not in page


def test_a_run_without_a_budget_or_freezing_has_neither_section(tmp_path: Path) -> None:
    page = page_of(new_results(), tmp_path)
    assert "<h2>Budget</h2>" not in page and "<h2>Frozen branches</h2>" not in page


def test_branches_know_when_they_froze_and_who_used_them_again(tmp_path: Path) -> None:
    results = with_frozen()
    assert branches(results) == {
        f"{LANGUAGE}0.attn.q": {
            "e0": Branch(None, ()),
            "e1": Branch("a<b", ("later",)),
            "e2": Branch("later", ()),
        }
    }
    page = page_of(results, tmp_path)
    assert {title for title in titles(page) if title.startswith("0.attn.q")} == {
        "0.attn.q, e0: tunable",
        "0.attn.q, e1: frozen after a&lt;b, used most again in later",
        "0.attn.q, e2: frozen after later",
    }
    assert (
        page.count('<circle class="again t1"') == 1
        and page.count('class="cell t0"') == page.count('class="cell t1"') == 1
    )
    table = page[page.index("<h2>Frozen branches</h2>") :]
    assert re.findall(r"<td>([^<]*)</td>", table)[:6] == ["1", "0", "2 (67 %)", "1", "1", "1 (33 %)"]


def test_where_no_branch_was_used_again_nothing_is_said_about_it(tmp_path: Path) -> None:
    results = with_frozen()
    results.freezing["later"][f"{LANGUAGE}0.attn.q"] = ["e2"]
    page = page_of(results, tmp_path)
    assert "Used again" not in page and "A dot" not in page and '<circle class="again' not in page


def drawn(count: int) -> tuple[str, list[float], float]:
    """A map of so many modules in layers of four, the left edges of its columns, and its width."""
    cells: list[Cell | None] = [Cell("", f"m{n}") for n in range(count)]
    svg = draw_map([(str(n), 4) for n in range(count // 4)], [("task", cells)], title="t").html
    edges = [float(x) for x in re.findall(r'<rect class="cell" x="([\d.]+)"', svg)]
    width = re.search(r'<svg viewBox="0 0 ([\d.]+)', svg)
    assert width
    return svg, edges, float(width.group(1))


@pytest.mark.parametrize("count", [16, 224])
def test_columns_neither_overlap_nor_leave_the_map(count: int) -> None:
    svg, edges, width = drawn(count)
    assert len(edges) == count
    steps = {round(right - left, 2) for left, right in pairwise(edges)}
    assert len(steps) == 2 and min(steps) >= SMALLEST  # within a layer, and between layers
    cell = float(re.findall(r'width="([\d.]+)"', svg)[1])
    assert cell < min(steps) and edges[-1] + cell <= width + 1
    labels = [(float(x), text) for x, text in re.findall(r'<text class="axis" x="([\d.]+)" y="12">(\d+)<', svg)]
    assert labels[0] == (0.0, "0")
    assert all(x + 7 * len(text) < after for (x, text), (after, _) in pairwise(labels))


def test_the_picture_has_a_block_per_expert_and_per_empty_slot() -> None:
    picture = placement_image(with_budget())
    assert picture.dtype == np.uint8 and picture.shape[2] == 3
    pixels = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert {SLOT, (0x00, 0x68, 0xB0), (0xB3, 0x54, 0x0A)} <= pixels


def test_tensorboard_gets_the_picture_of_a_run_with_a_budget_only(tmp_path: Path) -> None:
    logger = StageTensorBoardLogger(tmp_path)
    logger.log_forgetting(new_results(), 0)
    logger.log_forgetting(with_budget(), 1)
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("placement")] == [1]


@pytest.fixture
def towers() -> SimpleNamespace:
    adapters = {
        "lm.layers.10.q": SimpleNamespace(lora_b={"e0": 0, "e1": 0}),
        "lm.layers.2.q": SimpleNamespace(lora_b={"e0": 0}),
    }
    tower_of: Callable[[str], str] = lambda path: "vision" if path.startswith("vt") else "language"  # noqa: E731
    return SimpleNamespace(adapters=adapters, tower_of=tower_of)


def test_the_structure_of_the_evaluated_model_replaces_what_was_known(towers: SimpleNamespace) -> None:
    log = StructureLog()
    log.append(
        TaskPlan("a<b", ranks={"lm.layers.10.q": 4}, extra={"scores": {"vt.layers.0.q": 0.1, "lm.layers.10.q": 1.0}})
    )
    log.append(FreezeRecord("a<b", {"lm.layers.10.q": ["e1"]}))
    log.append(TaskPlan("later", ranks={"lm.layers.2.q": 4}))
    results = new_results()
    results.modules, results.freezing = {"language": {"gone": []}}, {"gone": {}}
    _enter_structure(results, log, towers)
    assert results.modules == {
        "vision": {"vt.layers.0.q": []},
        "language": {"lm.layers.2.q": ["e0"], "lm.layers.10.q": ["e0", "e1"]},
    }
    assert list(results.modules["language"]) == ["lm.layers.2.q", "lm.layers.10.q"]
    assert results.freezing == {"a<b": {"lm.layers.10.q": ["e1"]}}
