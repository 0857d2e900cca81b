"""The report's part on published numbers, from results.json files made by hand."""

import json
import re
from pathlib import Path

import pytest
import yaml

from mcit_lightning.evaluation.report import write_report
from mcit_lightning.evaluation.report_published import backward_over_stages
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.task_lookup import find_task_config
from mcit_lightning.evaluation.transfer import TransferMatrix

DOMAIN = ["rs", "med", "ad", "sci", "fin"]
DMOLE = ["vizwiz_caption", "skvg", "textcaps", "iconqa", "ocrvqa", "flickr30k", "vizwiz", "kvqa", "pmcvqa"]
COIN = ["scienceqa", "textvqa", "imagenet", "gqa", "vizwiz", "grounding", "vqav2", "ocrvqa"]


def by_hand(
    root: Path, benchmark: str, tasks: list[str], backbone: str, *, stages: int, whole: bool = False, **data: object
) -> None:
    """A run whose task i has 80 when learnt and loses 4 with every stage; 10 before it was learnt (`whole`)."""
    cells = range(len(tasks))
    matrix = [[80.0 - 4 * (t - i) if i <= t else 10.0 if whole else None for i in cells] if t < stages else [None] * len(tasks)
              for t in cells]  # fmt: skip
    metrics = {task: find_task_config(f"{benchmark}/{task}").metric for task in tasks}
    cost = [{"stage": task, "folder": f"stage_{n:02d}", "row": n - 1} for n, task in enumerate(tasks[:stages], start=1)]
    root.mkdir(parents=True, exist_ok=True)
    values = {
        "experiment": "mine",
        "strategy": "dmole",
        "backbone": backbone,
        "seed": 1,
        "tasks": tasks,
        "metrics": metrics,
    }
    values |= {"matrix": matrix, "zero_shot": [30.5] * len(tasks), "routing": None, "cost": cost, "notes": {}}
    (root / "results.json").write_text(json.dumps(values))
    config = {"data": {"limit_test": None, "limit_train": None, "fraction": 1.0, **data},
              "tasks": {task: {"metric_mode": "published"} for task in tasks}}  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(config))


def section_of(root: Path) -> str:
    config = root / "config.yaml"
    text = config.read_text() if config.is_file() else ""
    page = write_report(root, Results.load(root), text).read_text(encoding="utf-8")
    return next((part for part in page.split("<section>") if part.startswith("<h2>Published numbers</h2>")), "")


def rows(html: str) -> dict[str, list[str]]:
    """Row name -> its cells as text."""
    found = {}
    for name, cells in re.findall(r'<tr><th scope="row">([^<]*)</th>(.*?)</tr>', html):
        found[name] = [re.sub(r"<[^>]*>", "", cell) for cell in re.findall(r"<td>(.*?)</td>", cells)]
    return found


def columns(html: str) -> list[str]:
    return re.findall(r'<th scope="col">([^<]*)</th>', html)


def notes(html: str) -> list[str]:
    return re.findall(r'<p class="note">([^<]*)</p>', html)


def test_a_finished_run_stands_beside_the_rows_of_its_benchmark(tmp_path: Path) -> None:
    by_hand(tmp_path, "mllm_cl_domain", DOMAIN, "llava-hf/llava-1.5-7b-hf", stages=5)
    html = section_of(tmp_path)
    assert columns(html) == ["Method", *DOMAIN, "MFT", "MFN", "MAA", "BWT", "Source"]
    found = rows(html)
    # last row 64 68 72 76 80; MFN after t stages is 80 - 2 (t - 1), so MAA 76; BWT -(16 + 12 + 8 + 4) / 4
    assert found["This run"] == ["64.00", "68.00", "72.00", "76.00", "80.00", "80.00", "72.00", "76.00", "−10.00", ""]
    assert found["This run, zero-shot"] == ["30.50"] * 5 + ["–"] * 4 + [""]
    assert found["phi-DPO (s)"] == [
        "85.68", "69.74", "57.73", "61.55", "95.28", "74.29", "74.00", "75.68", "−0.37", "arXiv 2602.22601, Table 1"
    ]  # fmt: skip
    assert len(found) == 14 + 2 and list(found)[:2] == ["This run, zero-shot", "This run"]
    assert "divides by T - 1" in html and notes(html) == []


def test_an_unfinished_run_has_scores_but_no_aggregates(tmp_path: Path) -> None:
    by_hand(tmp_path, "mllm_cl_domain", DOMAIN, "llava-hf/llava-1.5-7b-hf", stages=2)
    assert rows(section_of(tmp_path))["This run, after 2 of 5 tasks"] == ["76.00", "80.00"] + ["–"] * 7 + [""]


def test_dmoles_backward_transfer_is_the_mean_over_stages(tmp_path: Path) -> None:
    by_hand(tmp_path, "dmole9", DMOLE, "OpenGVLab/InternVL2-2B", stages=9, whole=True)
    html = section_of(tmp_path)
    own = dict(zip(columns(html)[1:], rows(html)["This run"], strict=True))
    # task i (of the first eight) loses 4, 8, ..., 4 (9 - i): -4 (10 - i) / 2 on average; their mean is -2 (9 + ... + 2) / 8
    assert own["BWT (mean over stages)"] == "−11.00"
    # learnt cells: 45 of 81; rows' sums are 80 t - 2 t (t - 1), summed 3600 - 480; the other 36 cells are 10
    assert own["AVG"] == f"{(3600 - 480 + 360) / 81:.2f}" and "BWT" not in own
    assert dict(zip(columns(html)[1:], rows(html)["D-MoLE"], strict=True))["BWT (mean over stages)"] == "−1.49"
    assert rows(html)["each task alone, just learnt"][0] == "151.36" and rows(html)["zero-shot"][0] == "50.54"
    assert notes(html) == []


def test_backward_over_stages_needs_every_later_score() -> None:
    matrix = TransferMatrix(["a", "b", "c"])
    for row, scores in enumerate([[50.0], [40.0, 60.0], [30.0, 66.0, 70.0]]):
        for task, score in zip("abc", scores, strict=False):
            matrix.set(row, task, score)
    assert backward_over_stages(matrix) == pytest.approx(((-10 - 20) / 2 + 6) / 2)
    matrix.scores[1][0] = None
    assert backward_over_stages(matrix) is None
    assert backward_over_stages(TransferMatrix(["a"])) is None


def test_protocols_stand_apart_and_each_names_its_backbone(tmp_path: Path) -> None:
    by_hand(tmp_path, "coin", COIN, "llava-hf/llava-1.5-7b-hf", stages=8)
    html = section_of(tmp_path)
    tables = html.split("<h3>")[1:]
    assert [table.partition("</h3>")[0] for table in tables] == [
        "coin_vicuna: Vicuna-7B and the pretrained projector",
        "coin_vicuna_13b: Vicuna-13B and the pretrained projector",
        "coin_llava: LLaVA-1.5-7B",
    ]
    assert [columns(table)[1:] for table in tables] == [["MFN", "MAA", "BWT (divided by T)", "Source"]] * 2 + [
        ["MFN", "MAA", "Source"]
    ]
    # BWT is -4 (7 + 6 + ... + 1) / 7 = -16, and 7/8 of it when divided by T
    assert rows(tables[0])["This run"][2] == "−14.00"
    first, second, third, fourth = notes(html)[0], *[notes(table) for table in tables]
    assert "compare within one table only" in first
    assert "Vicuna-7B" in second[0] and "Vicuna-13B" in third[0] and fourth == []


def test_what_keeps_a_run_from_comparing_is_said(tmp_path: Path) -> None:
    by_hand(tmp_path, "mllm_cl_domain", DOMAIN, "Qwen/Qwen2-VL-2B-Instruct", stages=5, limit_test=100, fraction=0.5)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    config["tasks"]["med"]["metric_mode"] = "fixed"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    values = json.loads((tmp_path / "results.json").read_text())
    usual = values["metrics"]["fin"]
    values["metrics"]["fin"] = "anls"
    (tmp_path / "results.json").write_text(json.dumps(values))
    fixed, metric, test_rows, part, backbone = notes(section_of(tmp_path))
    assert "(metric_mode: fixed): med." in fixed
    assert f"fin by anls, not {usual}" in metric
    assert "at most 100 test rows" in test_rows and "part of the training rows" in part
    assert "LLaVA-1.5-7B" in backbone and "Qwen2-VL" in backbone
    (tmp_path / "config.yaml").unlink()
    assert "configuration is not known" in notes(section_of(tmp_path))[0]


def test_other_instructions_of_the_same_tasks_are_said(tmp_path: Path) -> None:
    for name, said in (("Instructions_Original", False), ("Instructions_Diverse", True), ("annotations", True)):
        by_hand(tmp_path, "coin", COIN, "llava-hf/llava-1.5-7b-hf", stages=8, annotations=name)
        shown = [note for note in notes(section_of(tmp_path)) if note.startswith("Other instructions")]
        assert len(shown) == said and all(
            f"{name}) than those" in note and "Instructions_Original" in note for note in shown
        )


def test_other_tasks_or_another_order_have_no_section(tmp_path: Path) -> None:
    by_hand(tmp_path, "mllm_cl_domain", [*DOMAIN[1:], DOMAIN[0]], "x", stages=5)
    assert section_of(tmp_path) == ""
    by_hand(tmp_path, "mllm_cl_domain", DOMAIN[:2], "x", stages=2)
    assert section_of(tmp_path) == ""
