"""Accuracy and confusion of a router, counted from prediction files."""

import json
from pathlib import Path

from mcit_lightning.evaluation.predictions import prediction_file
from mcit_lightning.evaluation.routing import NOWHERE, routing_summary


def write(root: Path, task: str, routes: list[list[str] | None]) -> None:
    path = prediction_file(root, "stage_02", task)
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"index": i, **({} if route is None else {"routed_to": route})} for i, route in enumerate(routes)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_first_choice_counts_and_unlearnt_tasks_do_not(tmp_path: Path) -> None:
    write(tmp_path, "a", [["a"], ["a", "b"], ["b", "a"], []])  # the third is wrong, though its own task helps
    write(tmp_path, "b", [["b"], ["b"], ["b"], ["a"]])
    write(tmp_path, "later", [["a"], []])
    summary = routing_summary(tmp_path, "stage_02", ["a", "b", "later"], ["a", "b"])
    assert summary == {
        "accuracy": 100 * 5 / 8,
        "among": 100 * 6 / 8,
        "confusion": {"a": {"a": 2, "b": 1, NOWHERE: 1}, "b": {"b": 3, "a": 1}, "later": {"a": 1, NOWHERE: 1}},
        "rejected": {"a": 25.0, "b": 0.0, "later": 50.0},
        "experts": {"a": 5 / 4, "b": 1.0, "later": 0.5},
    }


def test_predictions_that_were_not_routed_give_nothing(tmp_path: Path) -> None:
    write(tmp_path, "a", [None, None])
    assert routing_summary(tmp_path, "stage_02", ["a", "missing"], ["a"]) is None


def test_only_unlearnt_tasks_have_no_accuracy(tmp_path: Path) -> None:
    write(tmp_path, "later", [[], []])
    summary = routing_summary(tmp_path, "stage_02", ["later"], ["a"])
    assert summary is not None
    assert (summary["accuracy"], summary["among"], summary["rejected"]) == (None, None, {"later": 100.0})
