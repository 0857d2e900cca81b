import csv
import json
import os

import pytest

from mcit_lightning.evaluation.files import write_atomic
from mcit_lightning.evaluation.results import Results


@pytest.fixture
def results():
    results = Results("exp", "sequential", "tiny", 7, ["a, first", "b"], {"a, first": "exact_match", "b": "anls"})
    results.matrix.set_zero_shot("a, first", 12.5)
    results.matrix.set(0, "a, first", 80.123456789)
    results.matrix.set(1, "a, first", 60.0)
    results.matrix.set(1, "b", 70.0)
    results.cost_row("b", "stage_02", 1).train_seconds = 3.5
    results.cost_row("a, first", "stage_01", 0).trainable_params = 12
    results.notes["data"] = {"b": {"shortened": 1, "dropped": 0}}
    return results


def test_round_trip(results, tmp_path):
    results.save(tmp_path)
    assert Results.load(tmp_path).to_dict() == results.to_dict()
    values = json.loads((tmp_path / "results.json").read_text())
    assert set(values) >= {
        "experiment",
        "strategy",
        "backbone",
        "seed",
        "tasks",
        "matrix",
        "zero_shot",
        "summary",
        "routing",
        "cost",
    }
    assert values["matrix"] == [[80.123456789, None], [60.0, 70.0]]
    assert values["zero_shot"] == [12.5, None]
    assert values["summary"]["BWT"] == pytest.approx(60 - 80.123456789)
    assert [row["MFN"] for row in values["summary_per_stage"]] == [80.123456789, 65.0]
    assert [row["stage"] for row in values["cost"]] == ["a, first", "b"]
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []


NEW = ("allocation", "modules", "freezing")
NEW_COST = ("proxy_seconds", "router_seconds", "routing_seconds_per_sample", "generation_seconds_per_sample")


def test_what_a_strategy_decided_survives_with_the_order_of_stages_and_modules(results, tmp_path):
    results.modules = {"vision": {"v.10": [], "v.9": ["x"]}, "language": {"l.2": ["x", "y"]}}
    results.freezing = {"b": {"l.2": ["y"]}, "a, first": {"l.2": ["x", "y"]}}
    results.allocation = {"b": {"ratios": {"vision": 0.5}, "ranks": {"v.9": 4, "l.2": 4}}}
    results.cost[0].router_seconds = 1.5
    results.save(tmp_path)
    loaded = Results.load(tmp_path)
    assert loaded.to_dict() == results.to_dict()
    assert list(loaded.freezing) == ["b", "a, first"] and list(loaded.modules["vision"]) == ["v.10", "v.9"]
    assert (loaded.cost[0].router_seconds, loaded.cost[1].router_seconds) == (1.5, None)


def test_a_file_of_an_older_version_loads(results, tmp_path):
    results.save(tmp_path)
    path = tmp_path / "results.json"
    values = json.loads(path.read_text())
    for key in (*NEW, "sha256"):
        del values[key]
    for row in values["cost"]:
        for key in NEW_COST:
            del row[key]
    path.write_text(json.dumps(values))
    loaded = Results.load(tmp_path)
    assert loaded.to_dict() == results.to_dict()
    loaded.save(tmp_path)
    assert set(json.loads(path.read_text())) >= set(NEW)


def test_a_file_of_a_newer_version_is_refused_by_the_name_of_the_key(results, tmp_path):
    results.save(tmp_path)
    path = tmp_path / "results.json"
    values = json.loads(path.read_text())
    values["cost"][1] |= {"watts": 3, "joules": 4}
    del values["sha256"]
    path.write_text(json.dumps(values))
    expected = r"results\.json: cost: unknown key joules, watts; a newer version .* wrote the file.*overwrite=true"
    with pytest.raises(ValueError, match=expected) as error:
        Results.load(tmp_path)
    assert "damaged" not in str(error.value)


def test_a_changed_digit_is_noticed(results, tmp_path):
    results.save(tmp_path)
    path = tmp_path / "results.json"
    text = path.read_text()
    place = next(i for i, character in enumerate(text) if character in "12345")
    path.write_text(text[:place] + "6" + text[place + 1 :])
    with pytest.raises(ValueError, match=r"results\.json is damaged.*does not match its sha256.*remove that key"):
        Results.load(tmp_path)


def test_csv_has_a_row_per_stage_and_empty_cells(results, tmp_path):
    results.save(tmp_path)
    with (tmp_path / "accuracy_matrix.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            ["after", "a, first", "b"],
            ["zero_shot", "12.5000", ""],
            ["a, first", "80.1235", ""],
            ["b", "60.0000", "70.0000"],
        ]


def test_cost_row_is_made_once(results):
    assert results.cost_row("b", "stage_02", 1) is results.cost_row("b", "stage_02", 1)
    assert (results.folder_of(1), results.folder_of(5)) == ("stage_02", None)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"experiment": "x"}', "\x00\x00"])
def test_a_damaged_file_is_named_with_the_remedy(content, tmp_path):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json is damaged .*overwrite=true"):
        Results.load(tmp_path)


def test_a_truncated_file_is_damaged(results, tmp_path):
    results.save(tmp_path)
    path = tmp_path / "results.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        Results.load(tmp_path)


def test_no_file_is_another_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        Results.load(tmp_path)


def test_a_full_disk_leaves_the_old_file(results, tmp_path, monkeypatch):
    results.save(tmp_path)
    before = (tmp_path / "results.json").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    results.matrix.set(1, "b", 99.0)
    with pytest.raises(OSError, match="No space left"):
        results.save(tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["accuracy_matrix.csv", "results.json"]


def test_write_atomic_makes_the_folder_and_replaces(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_atomic(path, "ä")
    write_atomic(path, b"bytes")
    assert path.read_bytes() == b"bytes"
    assert list(path.parent.iterdir()) == [path]


def test_metrics_must_cover_the_tasks():
    with pytest.raises(ValueError, match="metrics are given for"):
        Results("e", "s", "b", 0, ["a"], {})
