"""Malformed files of every kind that is read: each is accepted, or refused with one message that names it and the remedy; none
hangs, and none is changed or deleted."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from fuzz import byte_mutations, content_of, problem, put, strange_places
from PIL import Image

from mcit_lightning.__main__ import main
from mcit_lightning.config import DataConfig, ExperimentConfig, TaskConfig
from mcit_lightning.data.images import load_image
from mcit_lightning.data.records import Sample
from mcit_lightning.data.references import read_references
from mcit_lightning.data.splits import open_split
from mcit_lightning.evaluation.answers import read_answers
from mcit_lightning.evaluation.judge import write_for_judge
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.rundir import RunDirectory

Content = bytes | Callable[[], None]
COUNTED: dict[str, int] = {}


def check(kind: str, path: Path, cases: Iterable[tuple[str, Content]], read: Callable[[], Any], *names: str) -> None:
    """Put every case in the place of `path`, read it, and collect what is wrong."""
    found, number = [], 0
    for label, content in cases:
        put(path, content)
        before = content_of(path.parent)
        number += 1
        if (wrong := problem(read, *(names or (path.name,)))) is not None:
            found.append(f"{label}: {wrong}")
        if content_of(path.parent) != before:
            found.append(f"{label}: reading has changed a file")
    COUNTED[kind] = number
    assert not found, f"{len(found)} of {number} {kind}:\n" + "\n".join(found)


def all_of(path: Path, whole: bytes, count: int, *more: tuple[str, bytes]) -> list[tuple[str, Content]]:
    return [*byte_mutations(whole, path.name, count), *strange_places(path), *more]


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]\n" for n in range(9)
)
YAMLS = [
    "!!python/object/apply:os.mkdir [executed]",
    "name: !!python/name:os.system",
    "name: !!binary aGk=\nseed: !!python/tuple [1, 2]",
    "name: !unknown x",
    BOMB,
    "&a [*a]",
    "name: &a {b: *a}",
    "tasks: &t {x: *t}",
    "[" * 3000,
    "a: {" * 3000,
    "? [a, b]\n: c",
    "1: 2\n3.5: 4\nnull: 5\ntrue: 6",
    "name: ${name}",
    "name: ${oc.env:NO_SUCH_VARIABLE}",
    "name: ${nowhere.at.all}",
    "name: ${unknown:resolver}",
    "name: '${'",
    "base: [../../../../../../../../etc/passwd]",
    "base: .",
    "base: [[]]",
    'base: "a\\0b"',
    f"base: {'x' * 5000}",
    "name: " + "9" * 5000,
    "seed: .nan",
    "seed: .inf",
    "seed: 1e400",
    f"seed: {'9' * 5000}",
    "tasks: {" + ", ".join(f"t{n}: null" for n in range(50)) + "}",
    "\t\tname: x",
    "name: x\n--- \nname: y",
    "%TAG ! tag:x\n---\nname: x",
    "name: >\n",
]
SECTIONS = (
    "backbone",
    "data",
    "optim",
    "prompt",
    "strategy",
    "trainer",
    "callbacks",
    "tasks",
    "order",
    "imports",
    "prepare",
)
WRONG = (
    "3",
    "text",
    "null",
    "[1, {a: b}]",
    "{a: [b]}",
    "{1: 2}",
    "{_target_: os.mkdir}",
    "[[[]]]",
    ".nan",
    "2001-01-01",
)


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_experiment_files(every: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    smoke = (experiments_dir() / "smoke.yaml").read_bytes()
    path = tmp_path / "x.yaml"
    base = f"base: {experiments_dir() / 'smoke.yaml'}\nname: x\n"
    more = [(text[:40], text.encode()) for text in YAMLS]
    more += [(f"{key}: {value}", f"{base}{key}: {value}\n".encode()) for key in SECTIONS for value in WRONG][::every]
    check(
        "experiment files",
        path,
        all_of(path, smoke, 40 // every, *more),
        lambda: load_config(path),
        "x.yaml",
        "/etc/passwd",
    )
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_overrides(every: int) -> None:
    smoke = experiments_dir() / "smoke.yaml"
    keys = [
        *SECTIONS,
        "tasks.colours",
        "tasks.colours.epochs",
        "optim.lr",
        "trainer.devices",
        "callbacks.0",
        "order.0",
        "a.b.c",
    ]
    values = (*WRONG, "'", "&a *a", "!!python/name:os.system", "${x}", "\0", "[" * 500, "9" * 400, "é\ud800")
    cases, found = [(key, value) for key in keys for value in values][::every], []
    for key, value in cases:
        if (wrong := problem(lambda: load_config(smoke, [f"{key}={value}"]), key.split(".")[0])) is not None:  # noqa: B023
            found.append(f"{key}={value[:40]}: {wrong}")
    COUNTED["overrides"] = len(cases)
    assert not found, "\n".join(found)


ROWS = [
    {
        "id": n,
        "image": f"{n % 2}.png",
        "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
    }
    for n in range(4)
]
TESTS = [{"question_id": n, "image": "0.png", "text": f"Q{n}", "answer": "A"} for n in range(4)]
JSONS = [
    "[" * 100_000,
    '{"a":' * 100_000,
    '"' * 1000,
    "[NaN, Infinity, -Infinity]",
    "[1e999]",
    f"[{'9' * 6000}]",
    "null",
    "3",
    '"text"',
    "{}",
    "[]",
    '[{"id": 1, "id": 2}]',
    '[{"id": "\\ud800"}]',
    '[{"id": "\\u0000"}]',
    '[{"id": 1, "image": "../../../../etc/passwd", "conversations": []}]',
    json.dumps([{**ROWS[0], "image": "../../../../../../etc/passwd"}]),
    json.dumps([{**ROWS[0], "image": "/dev/zero"}]),
    json.dumps([{**ROWS[0], "image": "."}]),
    json.dumps([{**ROWS[0], "image": "x" * 5000}]),
    json.dumps([{**ROWS[0], "image": "a\0b"}]),
    json.dumps([{**ROWS[0], "image": ["0.png"] * 3000}]),
    json.dumps([{**TESTS[0], "question_id": float("nan")}]),
    json.dumps([{**TESTS[0], "answer": {"a": [[[]]]}}]),
    json.dumps({"images": [], "annotations": 3}),
    json.dumps({"images": [{"id": [], "file_name": 3}], "annotations": []}),
    json.dumps({"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": None}]}),
]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    root.mkdir()
    for number in range(2):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(root / f"{number}.png")
    return root


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_rows(ending: str, split: Any, data: Path) -> None:
    rows = ROWS if split == "train" else TESTS
    whole = json.dumps(rows, indent=1) if ending == "json" else "\n".join(map(json.dumps, rows))
    path = data / f"rows.{ending}"
    more = [(text[:40], text.encode()) for text in JSONS]
    task = TaskConfig(**{split: path.name})  # type: ignore[arg-type]

    def read() -> None:
        for sample in open_split(DataConfig(root=str(data)), "t", task, split, 0):
            for image in sample.images:
                load_image(image, sample)

    check(f"{split} rows as {ending}", path, all_of(path, whole.encode(), 25, *more), read)


@pytest.mark.slow
def test_datasets(data: Path) -> None:
    from datasets import Dataset

    path = data / "rows.parquet"
    Dataset.from_list([{"question": "Q", "answer": "A", "image": "0.png"}] * 4).to_parquet(path)
    task = TaskConfig(test=path.name)

    def read() -> None:
        for sample in open_split(DataConfig(root=str(data)), "t", task, "test", 0):
            for image in sample.images:
                load_image(image, sample)

    check("datasets", path, all_of(path, path.read_bytes(), 15), read, "rows.parquet")


@pytest.mark.parametrize("form", ["coco", "vqa", "gqa", "rows"])
def test_references(form: str, data: Path) -> None:
    whole: Any = {
        "coco": {"images": [{"id": 1, "file_name": "0.png"}], "annotations": [{"image_id": 1, "caption": "a cat"}]},
        "vqa": {"annotations": [{"question_id": 0, "answers": [{"answer": "A"}] * 10}]},
        "gqa": {"0": {"answer": "A"}, "1": {"answer": "B"}},
        "rows": TESTS,
    }[form]
    path = data / "answers.json"
    more = [(text[:40], text.encode()) for text in JSONS]
    more += [
        (f"{form} of {junk!r}", json.dumps(_replaced(whole, junk)).encode()) for junk in (None, 3, "x", [], {}, [[1]])
    ]
    check(
        f"references as {form}",
        path,
        all_of(path, json.dumps(whole).encode(), 15, *more),
        lambda: read_references(path, "tasks.t.references"),
    )


def _replaced(value: Any, junk: Any) -> Any:
    """A copy in which the innermost values are something else."""
    if isinstance(value, dict):
        return {key: _replaced(inner, junk) for key, inner in value.items()}
    if isinstance(value, list):
        return [_replaced(inner, junk) for inner in value]
    return junk


PREDICTIONS = [
    {"question_id": n, "prompt": "Q", "text": "A", "answer": "A", "score": 1.0, "task": "t", "index": n}
    for n in range(3)
]


def test_predictions(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = "\n".join(map(json.dumps, PREDICTIONS)).encode()
    junk = (None, 3, "x", [], {}, 1e400, "\0", "9" * 400)
    more = [
        (f"{key} is {value!r:.20}", json.dumps({**PREDICTIONS[0], key: value}).encode())
        for key in PREDICTIONS[0]
        for value in junk
    ]
    more += [(text[:40], text.encode()) for text in JSONS]

    def read() -> None:
        read_answers(path)

    check("predictions", path, all_of(path, lines, 30, *more), read)


def test_what_a_judge_is_given(tmp_path: Path) -> None:
    answers, questions, rules = (tmp_path / name for name in ("p.jsonl", "q.json", "rule.json"))
    answers.write_text("\n".join(map(json.dumps, PREDICTIONS)))
    questions.write_text(json.dumps(TESTS))
    rule = {"CoIN": {"role": "Assistant", "prompt": "Rate."}}
    more = [(text[:40], text.encode()) for text in JSONS]
    out = tmp_path.parent / "judged.json"
    check(
        "rules of a judge",
        rules,
        all_of(rules, json.dumps(rule).encode(), 10, *more),
        lambda: write_for_judge("reasoning", answers, questions, rules, out),
    )
    table = tmp_path / "t.tsv"
    check(
        "tables of a judge",
        table,
        all_of(table, b"index\tquestion\tprediction\n0\tQ\t\n1\tQ\t\n", 10),
        lambda: write_for_judge("math", answers, None, table, out),
        "t.tsv",
        "prediction of",
    )


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_pictures(ending: str, data: Path) -> None:
    path = data / f"picture.{ending}"
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(path)
    whole = path.read_bytes()
    huge = bytearray(whole)
    if ending == "png":  # the header promises 60000 x 60000 pixels
        import struct
        import zlib

        huge[16:24] = struct.pack(">II", 60_000, 60_000)
        huge[29:33] = struct.pack(">I", zlib.crc32(huge[12:29]))
    more = [
        ("bomb", bytes(huge)),
        ("script", b'#!/bin/sh\n"evil"'),
        ("svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        ("eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) run\n"),
        ("other ending", (data / "0.png").read_bytes()),
    ]
    sample = Sample("1", "t", (str(path),), (("user", "Q"),), source="rows.json", row=0)
    check(f"pictures as {ending}", path, all_of(path, whole, 14, *more), lambda: load_image(str(path), sample))


def test_state_and_configuration_of_a_run(experiment: Callable[..., ExperimentConfig], tmp_path: Path) -> None:
    config = experiment(tmp_path / "run")
    directory = RunDirectory(config)
    state = (tmp_path / "run/state.json").read_bytes()
    directory.close()
    path = tmp_path / "run/state.json"

    def read() -> None:
        try:
            opened = RunDirectory(config)
        finally:
            for name in (".lock", "config.yaml"):  # what it makes itself is no change
                (tmp_path / "run" / name).unlink(missing_ok=True)
        opened.close()

    more = [(text[:40], text.encode()) for text in JSONS]
    values = json.loads(state)
    more += [
        (f"{key} is {junk!r}", json.dumps({**values, "sha256": None, key: junk}).encode())
        for key in values
        for junk in (None, -1, "x", [1.5])
    ]
    cases = [
        (label, content)
        for label, content in all_of(path, state, 15, *more)
        if label not in ("missing", "link to nowhere")
    ]
    (tmp_path / "run/.lock").unlink()
    (tmp_path / "run/config.yaml").unlink()
    check("states", path, cases, read, "state.json", "another configuration")


@pytest.mark.parametrize("name", ["results.json", "config.yaml", "predictions/stage_01/colours.jsonl"])
def test_files_of_a_report(
    name: str, uninterrupted: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(uninterrupted, tmp_path / "run")
    path = tmp_path / "run" / name
    whole = path.read_bytes()
    more = [(text[:40], text.encode()) for text in (YAMLS if name.endswith("yaml") else JSONS)]
    if name == "results.json":
        values = json.loads(whole)
        values.pop("sha256")
        for key in values:
            for junk in (None, 3, "x", [], {}, [[None]]):
                more.append((f"{key} is {junk!r}", json.dumps({**values, key: junk}).encode()))

    def read() -> None:
        caplog.clear()
        page = tmp_path / "run/report.html"
        before = page.read_bytes()
        status = main(["report", str(tmp_path / "run")])
        page.write_bytes(before)
        errors = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
        assert status == (2 if errors else 0) and len(errors) <= 1
        if errors:
            raise ValueError(errors[0])

    check(f"reports with {name}", path, all_of(path, whole, 12, *more), read, path.name, str(tmp_path / "run"))
    assert "Traceback" not in capfd.readouterr().err


def test_there_are_enough() -> None:
    """Runs last; counts what the tests above have read where they ran in this process."""
    assert not COUNTED or len(COUNTED) < 20 or sum(COUNTED.values()) >= 200, COUNTED
