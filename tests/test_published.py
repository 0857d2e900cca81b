"""The published numbers agree with themselves: means and transfers recomputed from the per-task scores."""

from statistics import fmean

import pytest

from mcit_lightning.evaluation.published import PublishedRow, published, published_for
from mcit_lightning.loading import experiments_dir

ROWS = published()
ROUNDED = 0.0101
"""Scores and their mean are both rounded to two decimals, so that they may differ by a hundredth."""


def name(row: PublishedRow) -> str:
    return f"{row.protocol.name}-{row.method}-{row.evidence}".replace(" ", "_")


@pytest.mark.parametrize("row", ROWS, ids=name)
def test_aggregates_are_those_of_the_tasks(row: PublishedRow) -> None:
    count, given = len(row.protocol.tasks), row.aggregates
    means = {
        "zero_shot": row.zero_shot,
        "MFT": row.just_learnt,
        "MFN": row.last,
        "AVG": row.average,
        "backward": row.backward,
    }
    for key, scores in means.items():
        if scores:
            assert len(scores) == count - (key == "backward")
            if key in given:
                assert given[key] == pytest.approx(fmean(scores), abs=ROUNDED), key
    if {"MFT", "MFN", "BWT"} <= given.keys():
        # three rounded numbers: the error of the first two is multiplied by T / (T - 1)
        backward = (given["MFN"] - given["MFT"]) * count / (count - 1)
        assert given["BWT"] == pytest.approx(backward, abs=ROUNDED / 2 + ROUNDED * count / (count - 1))
    assert given and row.evidence in ("paper", "secondary", "rerun")


def test_the_rerun_with_all_its_stages() -> None:
    """MCITlib's issue 6 holds the whole matrix: MFT 70.60, MAA 72.90, BWT -16.65."""
    (row,) = [row for row in ROWS if row.method == "LoRA-FT" and row.evidence == "rerun"]
    assert row.stages[-1] == pytest.approx(row.aggregates["MFN"])
    assert fmean(row.just_learnt) == pytest.approx(70.60, abs=ROUNDED)
    assert fmean(row.stages) == pytest.approx(72.90, abs=ROUNDED)
    backward = sum(a - b for a, b in zip(row.last, row.just_learnt, strict=True)) / 5
    assert backward == pytest.approx(-16.65, abs=ROUNDED)


def test_dmoles_first_task_just_learnt() -> None:
    """A[1][1] = AVG_1 - 8/9 BWT_1: what D-MoLE gives up on the first task against Seq-FT, 148.24 against 151.87."""
    rows = {row.method: row for row in ROWS if row.protocol.name == "dmole"}
    assert rows["D-MoLE"].average[0] - 8 / 9 * rows["D-MoLE"].backward[0] == pytest.approx(148.24, abs=ROUNDED)
    assert rows["Seq-FT"].average[0] - 8 / 9 * rows["Seq-FT"].backward[0] == pytest.approx(151.87, abs=ROUNDED)


def test_rows_of_one_protocol_are_listed_once() -> None:
    names = [name(row) for row in ROWS]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("protocol", {row.protocol.name: row.protocol for row in ROWS}.values(), ids=lambda p: p.name)
def test_protocols_are_those_of_the_presets(protocol: object) -> None:
    from omegaconf import OmegaConf

    config = OmegaConf.load(experiments_dir() / f"_base/{protocol.benchmark}.yaml")  # type: ignore[attr-defined]
    assert tuple(config.order) == protocol.tasks  # type: ignore[attr-defined]


def test_rows_for_a_run() -> None:
    found = published_for(["rs", "med", "ad", "sci", "fin"])
    assert {row.protocol.name for row in found} == {"mllm_cl_domain"} and len(found) == 14
    assert published_for(["rs", "med"]) == []


def test_the_document_has_every_row() -> None:
    """Each row's method stands in a line of docs/published.md, and its aggregates in that line or the next two."""
    lines = (experiments_dir().parent / "docs/published.md").read_text(encoding="utf-8").splitlines()
    marks = {"paper": "", "secondary": " (s)", "rerun": " (r)"}
    for row in ROWS:
        start = f"| {row.method}{marks[row.evidence]} |"
        digits = 1 if row.method == "EBLoRA" else 2
        numbers = [f"{value:.{digits}f}" for key, value in row.aggregates.items() if key != "zero_shot"]
        found = [n for n, line in enumerate(lines) if line.startswith(start)]
        assert any(all(number in "".join(lines[n : n + 3]) for number in numbers) for n in found), name(row)
