import json
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import pytest

from mcit_lightning.config import DataConfig, TaskConfig
from mcit_lightning.data.jsonscan import scan_array
from mcit_lightning.data.readers import check_file, file_format, read_file
from mcit_lightning.data.splits import TaskSplit, open_split

KEY = "tasks.t.train"
VALUES: list[Any] = [
    {"id": 1, "text": 'brackets ]} and "quotes", commas'},
    {"text": "Käse 猫 \N{GRINNING FACE} \\u00e9", "nested": [[], {}, [1, {"a": [None]}]]},
    12345678901234567890,
    -0.25e-7,
    "\\",
    True,
    None,
    [],
]


def rows_of(path: Path, kind: Any, skip: Any = None) -> tuple[list[Any], Any]:
    seen: dict[int, Any] = {}
    rows = read_file(path, kind, KEY, seen.__setitem__, skip)
    return [seen.get(index) for index in range(len(rows))], rows


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**22])
@pytest.mark.parametrize("form", [{}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (",", ":")}])
def test_arrays_are_read_alike_whatever_is_read_at_a_time(tmp_path: Path, chunk: int, form: dict[str, Any]) -> None:
    path = tmp_path / "a.json"
    for start in ("", "\ufeff", " \r\n\t"):
        path.write_text(start + json.dumps(VALUES, **form) + "\n ", encoding="utf-8")
        found = list(scan_array(path, KEY, chunk))
        assert [row for _, _, row in found] == VALUES
        content = path.read_bytes()
        assert [json.loads(content[first:last]) for first, last, _ in found] == VALUES


@pytest.mark.parametrize("chunk", [1, 5, 2**22])
def test_random_arrays_round_trip(tmp_path: Path, chunk: int) -> None:
    draw = random.Random(chunk)
    letters = 'ab"\\\n\té猫\N{GRINNING FACE}[]{},: '
    for _ in range(20):
        values = [{"".join(draw.choices(letters, k=5)): "".join(draw.choices(letters, k=9))} for _ in range(6)]
        (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=draw.random() < 0.5), encoding="utf-8")
        assert [row for _, _, row in scan_array(tmp_path / "a.json", KEY, chunk)] == values


@pytest.mark.parametrize("chunk", [1, 4, 2**22])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[{"a": 1},\n {"a" 2}]', "line 2, column 7: Expecting ':'"),
        ("[1,\n\n  2 3]", "line 3, column 5: Expecting ','"),
        ("[1, 2", "line 1, column 6: Expecting ','"),
        ("[1,]", "line 1, column 4: "),
        ("[1] x", "line 1, column 5: Extra data"),
        ('["a', "line 1, column 2: Unterminated string"),
        ("", "line 1, column 1: Expecting value"),
        ("[tru]", "line 1, column 2: Expecting value"),
        ('["\\ud83d"]', "line 1, column 2: half of a surrogate pair"),
        ("[" + "1" * 5000 + "]", "line 1, column 2: Exceeds the limit"),
        ("[" * 100_000, "line 1, column 2: maximum recursion depth"),
    ],
)
def test_syntax_errors_have_their_line_and_column(tmp_path: Path, chunk: int, text: str, said: str) -> None:
    if chunk == 1 and len(text) > 1000:
        pytest.skip("slow, and nothing new")
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"a\.json \(tasks\.t\.train\): JSON syntax error in ") as error:
        list(scan_array(tmp_path / "a.json", KEY, chunk))
    assert said in str(error.value)


def test_lines_that_are_no_json_are_named_or_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n{"a": \n"\xff"\n"\\udfff"\n' + b"[" * 100_000 + b'\n{"a": 2}')
    with pytest.raises(ValueError, match=r"line 3, column 6"):
        rows_of(path, "jsonl")
    errors: dict[int, ValueError] = {}
    found, rows = rows_of(path, "jsonl", errors.__setitem__)
    assert found == [{"a": 1}, None, None, None, None, {"a": 2}]
    assert [rows.row(0), rows.row(5)] == [{"a": 1}, {"a": 2}]
    said = ["line 3, column 6", "not UTF-8", "half of a surrogate pair", "recursion"]
    assert all(part in str(errors[index]) for index, part in enumerate(said, start=1))


def test_a_file_that_changed_during_the_run_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"a": 1}, {"a": 2}]))
    _, rows = rows_of(path, "json")
    assert pickle.loads(pickle.dumps(rows)).row(1) == {"a": 2}
    path.write_text("x" * 100)
    with pytest.raises(ValueError, match=r"a\.json, row 2: is no JSON any more .* has changed since"):
        rows.row(1)


def test_missing_files_name_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "CLEVR-Math").mkdir()
    (tmp_path / "CLEVR-Math/train_4w.json").write_text("[]")
    for name, said in (
        ("CLEVR/train_4w.json", "has 'CLEVR-Math', not 'CLEVR'"),
        ("CLEVR-Math/train.json", "has 'train_4w.json', not 'train.json'"),
        ("CLEVR-Math/trian_4w.json", "has 'train_4w.json', not 'trian_4w.json'"),
        ("Other/train.json", "does not exist. Correct"),
    ):
        with pytest.raises(ValueError, match=r"tasks\.t\.train: the file .* does not exist") as error:
            check_file(tmp_path / name, KEY)
        assert said in str(error.value)
    check_file(tmp_path / "CLEVR-Math/train_4w.json", KEY)
    assert file_format("a.ndjson", "auto", KEY) == "jsonl"


# Malformed rows that are left out


def test_malformed_rows_are_counted_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [{"question_id": n, "text": "?", "answer": "x"} for n in range(4)]
    lines = [good[0], "no row", good[1], {**good[2], "answer": None}, good[3], {**good[1]}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"question_id": '
    (tmp_path / "a.jsonl").write_text(text)
    with caplog.at_level(logging.WARNING):
        split = opened(tmp_path, "a.jsonl", malformed="skip")
    assert [sample.row for sample in split] == [0, 2, 4]
    assert (split.total, split.skipped, len(split.lengths)) == (7, 4, 3)
    assert "4 of 7 rows are malformed and left out; the first: " in caplog.text
    assert "a.jsonl, row 2 (tasks.t.test): the row is 'no row'" in caplog.text
    with pytest.raises(ValueError, match=r"a\.jsonl, row 2 "):
        opened(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl").write_text("1\n2")
    with pytest.raises(ValueError, match=r"row 1 .* is 1, not an object"):
        opened(tmp_path, "a.jsonl", malformed="skip")


def test_limits_take_from_the_usable_rows(tmp_path: Path) -> None:
    rows = [{"question_id": n, "text": "?", "answer": "x" if n % 2 else None} for n in range(40)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    split = opened(tmp_path, "a.json", malformed="skip", limit_test=5)
    assert (len(split), split.skipped) == (5, 20)
    assert all(sample.row % 2 for sample in split)


def test_a_metric_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcit_lightning.evaluation import captions

    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.json").write_text(json.dumps([{"question_id": 1, "text": "?", "answer": "x"}]))
    with pytest.raises(ValueError, match=r"tasks\.t\.metric: captions are scored by pycocoevalcap"):
        opened(tmp_path, "a.json", metric="cider")


def opened(root: Path, name: str, limit_test: int | None = None, **task: Any) -> TaskSplit:
    return open_split(DataConfig(root=str(root), limit_test=limit_test), "t", TaskConfig(test=name, **task), "test", 0)
