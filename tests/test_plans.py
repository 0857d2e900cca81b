"""The structure log as JSON."""

import json

import pytest

from mcit_lightning.plans import FreezeRecord, StructureLog, TaskPlan


def test_round_trip_through_json() -> None:
    log = StructureLog()
    log.append(TaskPlan("a", ranks={"x.q": 4}, ratios={"vision": 0.25}, extra={"threshold": [0.5]}))
    log.append(FreezeRecord("a", branches={"x.q": ["b1", "b2"]}))
    log.append(TaskPlan("b"))
    again = StructureLog.from_list(json.loads(json.dumps(log.to_list())))
    assert again.entries == log.entries and again.plan("a") == log.entries[0] and again.plan("c") is None


def test_a_stage_has_one_plan() -> None:
    log = StructureLog()
    log.append(TaskPlan("a"))
    log.append(FreezeRecord("a"))
    with pytest.raises(AssertionError):
        log.append(TaskPlan("a"))


def test_an_unknown_entry_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'Surprise'.*TaskPlan"):
        StructureLog.from_list([{"kind": "Surprise", "stage": "a"}])
