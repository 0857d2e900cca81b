"""`mcit-lightning report`: pages of finished and unfinished runs, written again without model or data."""

import base64
import io
import json
import re
from pathlib import Path

import pytest
import yaml
from PIL import Image

from mcit_lightning.__main__ import main
from mcit_lightning.evaluation.results import Results

TASKS = ["a", "b"]


def make_run(root: Path, data: Path, *, stages: int = 2) -> Path:
    """A run of two tasks, made by hand: task `a` is read from JSON and has pictures, `b` from JSON lines and has none."""
    results = Results("exp", "sequential", "org/model", 0, TASKS, dict.fromkeys(TASKS, "exact_match"))
    for row in range(stages):
        for task in TASKS[: row + 1]:
            results.matrix.set(row, task, 50.0)
        results.cost_row(TASKS[row], f"stage_{row + 1:02d}", row)
        for task in TASKS[: row + 1]:
            folder = root / f"predictions/stage_{row + 1:02d}"
            folder.mkdir(parents=True, exist_ok=True)
            answer = {"index": 1, "prompt": f"{task}?", "text": "x", "answer": "x", "score": 1.0, "task": task}
            (folder / f"{task}.jsonl").write_text(json.dumps(answer) + "\n")
    results.save(root)
    (root / "state.json").write_text("{}")
    tasks = {"a": {"test": "a.json", "images": "train", "test_images": "test", "gone": 1}, "b": {"test": "b.jsonl"}}
    (root / "config.yaml").write_text(yaml.safe_dump({"name": "exp", "data": {"root": str(data)}, "tasks": tasks}))
    return root


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two test files; the pictures of `a` are red and blue, and its answers are in no file."""
    folder = tmp_path / "data"
    (folder / "test").mkdir(parents=True)
    for name, colour in (("0", (250, 0, 0)), ("1", (0, 0, 250))):
        Image.new("RGB", (40, 30), colour).save(folder / f"test/{name}.png")
    asked = [{"question_id": n, "image": f"{n}.png", "text": "a?"} for n in range(2)]
    (folder / "a.json").write_text(json.dumps(asked))
    (folder / "b.jsonl").write_text("".join(json.dumps({"question_id": n, "text": "b?"}) + "\n" for n in range(2)))
    return folder


def pictures(root: Path) -> list[Image.Image]:
    found = re.findall(r'src="data:image/jpeg;base64,([^"]*)"', (root / "report.html").read_text())
    return [Image.open(io.BytesIO(base64.b64decode(code))) for code in found]


def test_pages_are_written_again_with_pictures(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    whole, part = make_run(tmp_path / "whole", data), make_run(tmp_path / "part", data, stages=1)
    (whole / "report.html").write_text("an old page")
    before = {
        path: path.read_bytes() for path in sorted(whole.rglob("*")) if path.is_file() and path.name != "report.html"
    }
    assert main(["report", "--each", str(whole), str(part)]) == 0
    assert capsys.readouterr().out.split() == [str(whole / "report.html"), str(part / "report.html")]
    page = (whole / "report.html").read_text()
    assert "finished" in page and "name: exp" in page and "a?" in page and "b?" in page
    assert "1 of 2 stages evaluated" in (part / "report.html").read_text()
    (picture,) = pictures(whole)
    red, _, blue = picture.convert("RGB").getpixel((5, 5))
    assert blue > 200 > 50 > red, "the picture of row 1"
    assert {path: path.read_bytes() for path in before} == before
    assert "without pictures" not in caplog.text


def test_without_the_data_there_are_no_pictures(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = make_run(tmp_path / "run", data)
    (data / "test/1.png").unlink()
    assert main(["report", str(root)]) == 0 and pictures(root) == []
    (data / "a.json").unlink()
    assert main(["report", str(root)]) == 0 and pictures(root) == []
    assert "a: samples are shown without pictures: tasks.a.test: the file" in caplog.text
    (data / "a.json").write_text('[{"question_id": 0}, {"question_id": 1, "image": 7}]')
    assert main(["report", str(root)]) == 0 and "`image` is 7" in caplog.text
    (root / "config.yaml").unlink()
    assert main(["report", str(root)]) == 0 and "names no file" in caplog.text
    assert "a?" in (root / "report.html").read_text()


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (lambda root: root.rename(root.with_name("elsewhere")), "no such folder"),
        (lambda root: [(root / name).unlink() for name in ("results.json", "state.json")], "is no run directory"),
        (lambda root: (root / "results.json").unlink(), "nothing was evaluated"),
        (lambda root: (root / "results.json").write_text("{"), "results.json is damaged"),
        (lambda root: (root / "config.yaml").write_text("a: [1"), "config.yaml: cannot be read as YAML"),
        (lambda root: (root / "config.yaml").write_text("- 1"), "config.yaml: is no mapping"),
        (lambda root: (root / "predictions/stage_02/b.jsonl").write_text("{"), "predictions are not as a run writes"),
        (lambda root: (root / "predictions/stage_02/b.jsonl").write_text('{"index": 0}\n'), "KeyError: 'score'"),
    ],
)
def test_a_folder_that_is_no_run_is_one_clear_error(
    spoil: object, wanted: str, tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = make_run(tmp_path / "good", data), make_run(tmp_path / "bad", data)
    spoil(bad)  # type: ignore[operator]
    assert main(["report", "--each", str(bad), str(good)]) == 2
    errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1 and str(bad) in errors[0] and wanted in errors[0]
    assert not (good / "report.html").exists()


def test_the_folder_above_runs_names_one_of_them(tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture) -> None:
    make_run(tmp_path / "runs/first", data)
    assert main(["report", "--each", str(tmp_path / "runs")]) == 2
    assert "its folder first is one" in caplog.text


def test_the_folder_above_runs_becomes_a_comparison_with_pictures(tmp_path: Path, data: Path) -> None:
    for name in ("first", "second"):
        (make_run(tmp_path / "runs" / name, data) / "state.json").write_text('{"finished": true}')
    assert main(["report", str(tmp_path / "runs")]) == 0
    page = (tmp_path / "runs/comparison.html").read_text()
    assert page.count('src="data:image/jpeg;base64,') == 1, "the one question of task a"
    assert not (tmp_path / "runs/first/report.html").exists()


def test_settings_that_are_no_tasks_only_cost_the_pictures(tmp_path: Path, data: Path) -> None:
    root = make_run(tmp_path / "run", data)
    (root / "config.yaml").write_text("data:\ntasks:\n")
    assert main(["report", str(root)]) == 0 and pictures(root) == []
