"""The page, the tables and the TensorBoard folder of a comparison."""

import csv
import io
import re
from pathlib import Path

import pytest
from comparison_runs import TASKS, make_run, make_sweep
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import parse

from mcit_lightning.__main__ import main
from mcit_lightning.comparison.find import find_runs
from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.grouping import compare_runs
from mcit_lightning.comparison.heat import HeatCell, heat_map
from mcit_lightning.comparison.methods import Comparison
from mcit_lightning.comparison.page import comparison_page
from mcit_lightning.comparison.raster import MARGIN, SCALE, rasterize
from mcit_lightning.comparison.samples import Answers, choose
from mcit_lightning.comparison.tables import comparison_tables, latex, markdown
from mcit_lightning.evaluation.colours import TASK_LIGHT


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sweep(tmp_path_factory.mktemp("sweep") / "small", seeds=3, orders=2)


@pytest.fixture(scope="module")
def comparison(sweep: Path) -> Comparison:
    return compare_runs(*find_runs([sweep]))


@pytest.fixture(scope="module")
def drawn(comparison: Comparison) -> tuple[str, Gallery]:
    return comparison_page(comparison, "Comparison", lambda run: lambda task, index: Image.new("RGB", (9, 9), "red"))


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_page_is_whole_and_needs_nothing_else(drawn: tuple[str, Gallery], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(drawn[0])
    page, parser = parse(tmp_path / "page.html")
    assert all(address.startswith(("data:image/jpeg", "#order")) for address in parser.addresses)
    assert "<script" not in page and "url(" not in page and "@import" not in page
    assert "&lt;digits&gt; 0?" in page, "text of the data is text"


def test_every_part_is_there_for_every_order(drawn: tuple[str, Gallery]) -> None:
    page, gallery = drawn
    for heading in (
        "Leaderboard", "Paired differences to sequential", "Plasticity and stability", "Forgetting curves",
        "Accuracy matrices", "Modality split", "Placement of experts", "Frozen branches and their reuse",
        "Router confusion", "Cost", "Sample answers",
    ):  # fmt: skip
        assert page.count(f"<h2>{heading}</h2>") == 2, heading
    for order in (1, 2):
        wanted = {
            "leaderboard",
            "difference_MFN",
            "difference_BWT",
            "plasticity_stability",
            "router_accuracy",
            "score_size",
        }
        wanted |= {f"forgetting/{task}" for task in TASKS}
        wanted |= {f"matrix/{name}" for name in ("sequential", "branchlora", "dmole", "joint")}
        wanted |= {"modality/dmole", "placement/dmole/vision", "placement/dmole/language", "router/dmole"}
        wanted |= {"freezing/branchlora/shares", "freezing/branchlora/language", "router/branchlora"}
        assert {
            name.removeprefix(f"order{order}/") for name in gallery.figures if name.startswith(f"order{order}/")
        } == wanted
    assert re.findall(r'data-figure="([^"]*)"', page) == list(gallery.figures)


def test_placement_shows_in_how_many_seeds(drawn: tuple[str, Gallery]) -> None:
    """Of three seeds all chose the first two modules, the odd one also a third, and none the fourth."""
    svg = drawn[1].figures["order1/placement/dmole/vision"]
    for path, about in (("0.q", "expert in 3 of 3"), ("1.q", "expert in 1 of 3 seeds, rank 4"), ("1.v", "no expert")):
        assert f"{path}, digits: {about}" in svg
    assert svg.count('fill-opacity="0.33"') == len(TASKS)
    assert "digits: Vision tower 36.5 %" in drawn[1].figures["order1/modality/dmole"], "(2/6 + 3/7 + 2/6) / 3"


def test_freezing_says_who_used_a_branch_again(drawn: tuple[str, Gallery]) -> None:
    """Of twelve branches four froze after digits, of which flags used two again; flags froze two, six are left."""
    table = drawn[1].figures["order1/freezing/branchlora/shares"]
    for text in (
        "33.3 % of the branches froze after digits",
        "16.7 % of the branches froze after flags",
        "50.0 % of the branches never",
    ):
        assert text in table
    assert "16.7 % of the branches froze after digits and were used most again by flags" in table
    assert drawn[1].figures["order1/freezing/branchlora/language"].count('class="again t1"') == 2


def test_router_confusion_counts_all_seeds(drawn: tuple[str, Gallery]) -> None:
    assert "27 of 30 samples of flags to flags" in drawn[1].figures["order1/router/dmole"]


def test_leaderboard_table_by_hand(comparison: Comparison) -> None:
    """sequential ends at 60 + s - 60, - 30, - 0: mean 30 + s; dmole keeps all: 60 + s."""
    found = {(r["order"], r["method"], r["measure"]): r for r in rows(comparison_tables(comparison)["leaderboard.csv"])}
    one = found["1", "sequential", "MFN"]
    assert (one["n"], one["mean"], one["sd"]) == ("3", "31", "1")
    assert float(one["ci95_high"]) == pytest.approx(31 + 4.302653 / 3**0.5, abs=1e-3)
    assert found["2", "dmole", "MFN"]["mean"] == "61" and ("1", "joint", "BWT") not in found
    differences = rows(comparison_tables(comparison)["differences.csv"])
    (pair,) = [r for r in differences if (r["order"], r["method"], r["measure"]) == ("1", "dmole", "MFN")]
    assert (pair["reference"], pair["mean"], pair["sd"]) == ("sequential", "30", "0")


def test_runs_and_scores_are_complete(comparison: Comparison) -> None:
    tables = comparison_tables(comparison)
    assert len(rows(tables["runs.csv"])) == 2 * 4 * 3
    assert len(rows(tables["scores.csv"])) == 2 * 3 * (3 * 6 + 3), "three methods fill six cells, joint three"


def test_tables_for_papers(comparison: Comparison) -> None:
    text = markdown(comparison)
    assert text.count("| method |") == 2 and "| sequential | 3 | 31.0 ± 2.5 |" in text
    assert "**61.0** ± 2.5" in text and "joint (upper bound)" in text and "95 % t-interval" in text
    tex = latex(comparison)
    assert tex.count("\\begin{tabular}") == tex.count("\\end{tabular}") == tex.count("\\toprule") == 2
    assert "\\textbf{61.0} $\\pm$ 2.5" in tex and "$-$45.0" in tex
    assert not [line for line in tex.splitlines() if not line.startswith("%") and not line.isascii()]


def test_names_are_escaped_in_latex(tmp_path: Path) -> None:
    make_run(tmp_path / "a_b%")
    make_run(tmp_path / "c", strategy="ewc")
    assert "a\\_b\\% & 1 &" in latex(compare_runs(*find_runs([tmp_path])))


def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", strategy="ewc", lost=0)
    comparison = compare_runs(*find_runs([tmp_path]))
    assert "±" not in markdown(comparison).split("\n", 1)[1]
    page, _ = comparison_page(comparison, "x", lambda run: None)
    assert 'class="whisker' not in page and "Fewer than three seeds" in page


def test_questions_on_which_methods_end_apart_come_first() -> None:
    def answers(learnt: str, final: str) -> dict[int, Answers]:
        pairs = zip(learnt, final, strict=True)
        return {n: Answers({"score": float(a)}, {"score": float(b)}) for n, (a, b) in enumerate(pairs)}

    # 0: all right; 1: none ever; 2: apart, nothing lost; 3: apart, one lost it; 4: both lost it
    one, two = answers("10011", "10000"), answers("10111", "10110")
    assert choose([one, two]) == [3, 2, 0, 4], "the one that both lost before the one that none ever knew"
    assert choose([one, {}]) == []


def test_a_matrix_of_tasks_with_long_names_is_numbered() -> None:
    tasks = ["vizwiz_caption", "text_vqa"]
    rows = [("before", [None, None]), *((task, [HeatCell(50.0, "x"), None]) for task in tasks)]
    svg = heat_map(rows, tasks, title="x")
    assert ">1<title>vizwiz_caption</title>" in svg and ">1 vizwiz_caption<" in svg and ">before<" in svg
    assert ">text_vqa<title>" in heat_map(rows, ["flags", "text_vqa"], title="x"), "not where the names fit"


def test_pictures_are_what_the_page_shows() -> None:
    """A dot, a dashed line and a heat cell at their places, in the page's colours."""
    svg = (
        '<svg viewBox="0 0 60 40"><title>x</title><circle class="dot s1" cx="10" cy="10" r="4"/>'
        '<polyline class="after s0 alt" points="0,30 60,30"/><g class="heat" style="--l:#123456;--li:#ffffff">'
        '<rect x="30" y="5" width="20" height="10"/></g><g transform="translate(40,0)"><rect class="cell" x="0" y="20" '
        'width="10" height="5"/></g></svg>'
    )
    picture = rasterize(svg)
    assert picture.shape == ((40 + 2 * MARGIN) * SCALE, (60 + 2 * MARGIN) * SCALE, 3)

    def at(x: float, y: float) -> str:
        return "#{:02x}{:02x}{:02x}".format(*picture[round((y + MARGIN) * SCALE), round((x + MARGIN) * SCALE)])

    assert at(10, 10) == TASK_LIGHT[1] and at(40, 10) == "#123456" and at(45, 22) == "#e1e5ea"
    assert (at(3, 30), at(10.5, 30), at(16, 30)) == (TASK_LIGHT[0], "#ffffff", TASK_LIGHT[0]), "8 drawn, 5 left out"


def test_every_figure_can_be_a_picture(drawn: tuple[str, Gallery]) -> None:
    for name, svg in drawn[1].figures.items():
        colours = Image.fromarray(rasterize(svg)).getcolors(100_000)
        assert len(colours) > 2, name


def test_the_command_writes_everything_and_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_sweep(tmp_path / "sweep", seeds=2)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for _ in range(2):
        assert main(["report", str(root)]) == 0
        assert str(root / "comparison.html") in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before, "runs are only read"
    written = {path.name for path in root.iterdir() if path.is_file()}
    tables = {"leaderboard.csv", "differences.csv", "runs.csv", "scores.csv", "leaderboard.md", "leaderboard.tex"}
    assert written == {"comparison.html"} | tables
    board = root / "tensorboard"
    assert len(list((board / "figures").iterdir())) == 1, "events of the earlier page are gone"
    figures = EventAccumulator(str(board / "figures")).Reload().Tags()["images"]
    assert len(figures) == (root / "comparison.html").read_text().count("data-figure=")
    scalars = EventAccumulator(str(board / "dmole")).Reload()
    assert [(e.step, e.value) for e in scalars.Scalars("score/digits")] == [(1, 60.5), (2, 60.5), (3, 60.5)]
    assert [e.value for e in scalars.Scalars("final/MFN")] == [60.5]
