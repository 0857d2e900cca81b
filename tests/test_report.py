import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from mcit_lightning.evaluation.colours import TASK_DARK, TASK_LIGHT, contrast, ink, score_colour
from mcit_lightning.evaluation.figures import matrix_image
from mcit_lightning.evaluation.formatting import amount_text, bytes_text, count_text, number_text, seconds_text
from mcit_lightning.evaluation.predictions import drop_parts, merge_parts, prediction_file, write_part
from mcit_lightning.evaluation.report import write_report
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.samples import choose_samples, thumbnail
from mcit_lightning.evaluation.table import stage_table

VOID = {"meta", "img", "br", "wbr", "line", "polyline"}
SHAPES = {"circle", "rect", "polygon"}
"""Elements of drawings that may close themselves, and may hold a title."""
EVIL = "<script>alert('x')</script>"


class Parser(HTMLParser):
    """Checks that tags are closed in order, and collects text and addresses."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        self.addresses += [
            value for name, value in attrs if name in ("src", "href", "action", "data", "poster", "srcset")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID | SHAPES
        self.handle_starttag(tag, attrs)
        if tag in SHAPES:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes {self.open[-3:]}"

    def handle_data(self, data):
        self.text.append(data)


def parse(path):
    page = path.read_text(encoding="utf-8")
    parser = Parser()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return page, parser


def make_results(tasks=("alpha", "beta", "gamma"), rows=3):
    results = Results("my_exp", "sequential", "org/model", 42, list(tasks), dict.fromkeys(tasks, "exact_match"))
    for column, task in enumerate(tasks):
        results.matrix.set_zero_shot(task, 11.1 + column)
    for row in range(rows):
        for column, task in enumerate(tasks[: row + 1]):
            results.matrix.set(row, task, 90.3 - 10 * (row - column) + column)
        results.cost_row(tasks[row], f"stage_{row + 1:02d}", row).train_seconds = 100.0 + row
    return results


def write_predictions(root, folder, task, scores):
    rows = [
        {
            "index": n,
            "prompt": f"question {n}?",
            "text": "right" if s else EVIL,
            "answer": "right",
            "score": s,
            "task": task,
        }
        for n, s in enumerate(scores)
    ]
    path = prediction_file(root, folder, task)
    write_part(path, 0, rows)
    merge_parts(path, 1, len(rows))


def test_every_value_is_on_the_page(tmp_path):
    results = make_results()
    page, parser = parse(write_report(tmp_path, results, "name: my_exp\nlr: 1.0e-4\n"))
    text = " ".join(parser.text)
    for scores in [results.zero_shot, *results.matrix.scores]:
        for score in scores:
            assert score is None or f"{score:.1f}" in text
    for value in results.summary.values():
        assert value is None or number_text(abs(value), digits=2) in text
    for expected in (
        "my_exp",
        "sequential",
        "org/model",
        "42",
        "lr: 1.0e-4",
        "1 min 40 s",
        "finished",
        "alpha",
        "gamma",
    ):
        assert expected in text
    assert page.count('<td class="empty">') == 3


def test_the_page_needs_no_network_and_no_script(tmp_path):
    write_predictions(tmp_path, "stage_01", "alpha", [1.0, 0.0])
    Image.new("RGBA", (600, 300), (255, 0, 0, 128)).save(tmp_path / "picture.png")
    page, parser = parse(write_report(tmp_path, make_results(), "", lambda task, index: tmp_path / "picture.png"))
    assert parser.addresses and all(address.startswith("data:image/jpeg;base64,") for address in parser.addresses)
    assert not re.search(r"https?://|//[a-z]|@import|url\(|<script|<link|<iframe", re.sub(r"data:[^\"]*", "", page))
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_text_is_escaped_everywhere(tmp_path):
    results = make_results(tasks=(EVIL, "b & c", "d\"e'"))
    results.experiment = results.strategy = results.backbone = EVIL
    results.cost[0].stage = EVIL
    results.notes["data"] = {EVIL: {"shortened": 2, "dropped": 1}}
    page, parser = parse(write_report(tmp_path, results, f"# {EVIL} $placeholder ${{other}}\n"))
    assert "<script" not in page
    assert EVIL in " ".join(parser.text) and "$placeholder ${other}" in " ".join(parser.text)


def test_samples_show_what_was_forgotten_first(tmp_path):
    results = make_results()
    write_predictions(tmp_path, "stage_01", "alpha", [0.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    write_predictions(tmp_path, "stage_03", "alpha", [0.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    chosen = choose_samples(tmp_path, results, "alpha")
    assert [sample.final["index"] for sample in chosen] == [2, 3, 1, 0]
    assert choose_samples(tmp_path, results, "beta") == []
    page, parser = parse(write_report(tmp_path, results, ""))
    assert "question 2?" in page and "At the end" in page and EVIL in " ".join(parser.text)
    assert "question 4?" not in page


def test_the_last_task_and_joint_runs_show_one_answer(tmp_path):
    results = make_results()
    write_predictions(tmp_path, "stage_03", "gamma", [1.0, 0.0])
    chosen = choose_samples(tmp_path, results, "gamma")
    assert [sample.final["score"] for sample in chosen] == [1.0, 0.0]
    assert all(sample.learnt is sample.final for sample in chosen)

    joint = Results("e", "joint", "b", 0, ["alpha", "gamma"], dict.fromkeys(["alpha", "gamma"], "anls"))
    joint.matrix.set(1, "alpha", 50.0)
    joint.cost_row("joint", "stage_03", 1)
    write_predictions(tmp_path, "stage_03", "alpha", [1.0, 0.0])
    assert all(sample.learnt is sample.final for sample in choose_samples(tmp_path, joint, "alpha"))
    page, _ = parse(write_report(tmp_path, joint, ""))
    assert (
        '<th scope="row"><span>joint</span>' in page and page.count("<tr>") == 6
    )  # a head and a row: the matrix, the cost of training and that of evaluation
    assert "Forgetting curves" not in page and "Plasticity" not in page
    assert joint.to_csv().splitlines() == ["after,alpha,gamma", "alpha,,", "joint,50.0000,"]


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_unfinished_runs_have_a_page(tmp_path, rows):
    _, parser = parse(write_report(tmp_path, make_results(rows=rows), ""))
    assert f"{rows} of 3 stages evaluated" in " ".join(parser.text)


def test_a_run_that_evaluated_nothing_has_a_page(tmp_path):
    results = make_results(rows=0)
    results.matrix.zero_shot = None
    parse(write_report(tmp_path, results, ""))


def test_mixed_metrics_and_cut_samples_are_said(tmp_path):
    results = make_results()
    results.metrics["beta"] = "anls"
    results.notes["data"] = {"alpha": {"shortened": 2, "dropped": 1}, "beta": {"shortened": 0, "dropped": 0}}
    text = " ".join(parse(write_report(tmp_path, results, ""))[1].text)
    assert "different metrics" in text and "beta: anls" in text
    assert "alpha: 2 training samples were shortened and 1 dropped" in text


def test_thumbnails(tmp_path):
    Image.new("L", (500, 20)).save(tmp_path / "grey.png")
    assert thumbnail(tmp_path / "grey.png").startswith("data:image/jpeg;base64,")
    assert thumbnail(Image.new("P", (4, 4))) is not None
    (tmp_path / "broken.png").write_text("no picture")
    assert thumbnail(tmp_path / "broken.png") is None
    assert thumbnail(tmp_path / "missing.png") is None


@pytest.mark.parametrize("dark", [False, True])
def test_cell_text_is_readable_on_every_score_and_the_scale_is_monotone(dark):
    colours = [score_colour(score, dark=dark) for score in range(-5, 131)]
    assert min(contrast(colour, ink(colour)) for colour in colours) >= 4.5
    greys = [sum(colour) for colour in colours]
    assert greys == sorted(greys, reverse=not dark)


def test_task_colours_are_readable():
    def rgb(text):
        return tuple(int(text[n : n + 2], 16) for n in (1, 3, 5))

    assert min(contrast(rgb(colour), (255, 255, 255)) for colour in TASK_LIGHT) >= 4.5
    assert min(contrast(rgb(colour), (0x12, 0x15, 0x1A)) for colour in TASK_DARK) >= 4.5


def test_numbers_for_reading():
    assert [number_text(v) for v in (None, -0.04, -3.25, 99.96)] == ["–", "0.0", "−3.2", "100.0"]
    assert [number_text(v, signed=True) for v in (1.0, -1.0, 0.0)] == ["+1.0", "−1.0", "0.0"]
    assert [count_text(v) for v in (None, 7, 1234, 7_062_000_000)] == ["–", "7", "1.23 k", "7.06 B"]
    assert [amount_text(v) for v in (None, 0.0740, 2.3381, 112.4, 1.2e-7)] == ["–", "0.0740", "2.34", "112", "1.20e−07"]
    assert [seconds_text(v) for v in (None, 0.0, 0.00394, 0.0124, 0.0994, 4.12, 59.96, 200, 3725)] == [
        "–",
        "0.0 ms",
        "3.9 ms",
        "12 ms",
        "99 ms",
        "4.1 s",
        "1 min 00 s",
        "3 min 20 s",
        "1 h 02 min",
    ]
    assert [bytes_text(v) for v in (None, 512 * 2**20, 3 * 2**30)] == ["–", "512 MiB", "3.00 GiB"]


def test_matrix_picture_for_tensorboard():
    picture = matrix_image(make_results().matrix)
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert tuple(score_colour(90.3)) in {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}


def test_stage_table_in_the_terminal():
    console = Console(width=100, record=True, file=io.StringIO())
    results = make_results(rows=2)
    console.print(stage_table(results))
    text = console.export_text()
    for expected in ("alpha", "zero-shot", "90.3", "80.3", "91.3", "MFN", "BWT", "training 1 min 41 s"):
        assert expected in text
    assert not [line for line in text.splitlines() if line.startswith("gamma")]
    Console(file=io.StringIO()).print(stage_table(make_results(rows=0)))


def test_summaries_and_cost_fit_eighty_columns():
    results = make_results()
    for row in range(3):
        for column, task in enumerate(results.tasks):
            results.matrix.set(row, task, 10.0 + row + column)
    cost = results.cost[-1]
    cost.trainable_params, cost.stored_params, cost.peak_memory_bytes = 999_994_000, 123_450_000, 1023 * 2**20
    cost.train_seconds = cost.eval_seconds = 123 * 3600.0
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(stage_table(results))
    lines = console.export_text().splitlines()[-4:]
    assert [line.split()[0] for line in lines] == ["MFT", "forgetting", "trainable", "evaluation"]
    assert "training 123 h 00 min" in lines[2]
    assert lines[3] == "evaluation 123 h 00 min  peak memory 1023 MiB"
    cost.proxy_seconds = cost.router_seconds = 3661.0
    console.print(stage_table(results))
    text = console.export_text()
    assert "probe 1 h 01 min  router 1 h 01 min" in text and max(map(len, text.splitlines())) <= 80


def test_predictions_file_is_sorted(tmp_path):
    path = prediction_file(tmp_path, "stage_01", "alpha")
    write_part(path, 0, [{"index": 3}, {"index": 0}])
    write_part(path, 1, [{"index": 1}])
    assert merge_parts(path, 2, 3) == 3
    drop_parts(tmp_path, "stage_01")
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1, 3]
    assert [p.name for p in path.parent.iterdir()] == ["alpha.jsonl"]
