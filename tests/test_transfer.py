import json
import math

import pytest

from mcit_lightning.evaluation.transfer import SUMMARY, TransferMatrix

TASKS = ["a", "b", "c"]


def full_matrix():
    """Every cell and the zero-shot row."""
    matrix = TransferMatrix(TASKS)
    for row, scores in enumerate([[80, 30, 20], [70, 90, 25], [60, 72, 75]]):
        for task, score in zip(TASKS, scores, strict=True):
            matrix.set(row, task, score)
    for task, score in zip(TASKS, [10, 20, 30], strict=True):
        matrix.set_zero_shot(task, score)
    return matrix


def seen_matrix():
    """The lower triangle only."""
    matrix = full_matrix()
    for row in range(3):
        for column in range(row + 1, 3):
            matrix.scores[row][column] = None
    return matrix


def test_summaries_of_a_hand_computed_matrix():
    summary = full_matrix().summary()
    assert summary == pytest.approx(
        {
            "MFT": (80 + 90 + 75) / 3,
            "MFN": (60 + 72 + 75) / 3,
            "MAA": (80 + (70 + 90) / 2 + (60 + 72 + 75) / 3) / 3,
            "BWT": ((60 - 80) + (72 - 90)) / 2,
            "BWT_T": ((60 - 80) + (72 - 90)) / 3,
            "AVG": (80 + 30 + 20 + 70 + 90 + 25 + 60 + 72 + 75) / 9,
            "forgetting": ((80 - 60) + (90 - 72)) / 2,
            "FWT": ((30 - 20) + (25 - 30)) / 2,
        }
    )
    assert tuple(summary) == SUMMARY


def test_forgetting_is_from_the_best_score_not_the_first():
    matrix = seen_matrix()
    matrix.set(1, "a", 85)
    summary = matrix.summary()
    assert summary["forgetting"] == pytest.approx(((85 - 60) + (90 - 72)) / 2)
    assert summary["BWT"] == pytest.approx(-19)


def test_seen_tasks_alone_leave_avg_and_fwt_undefined():
    summary = seen_matrix().summary()
    assert summary["AVG"] is None and summary["FWT"] is None
    assert all(summary[name] is not None for name in ("MFT", "MFN", "MAA", "BWT", "BWT_T", "forgetting"))


def test_fwt_needs_the_zero_shot_row():
    matrix = full_matrix()
    matrix.zero_shot = None
    assert matrix.summary()["FWT"] is None


def test_published_numbers_of_disco_on_ucit():
    """MCITlib prints MFT 75.87, MFN 69.66 and BWT -7.45 for six tasks: the divisor is T - 1."""
    tasks, last = list("abcdef"), [87.43, 93.07, 46.96, 68.13, 65.70, 56.69]
    matrix = TransferMatrix(tasks)
    for row, task in enumerate(tasks):
        matrix.set(row, task, (75.87 * 6 - last[5]) / 5)
    for task, score in zip(tasks, last, strict=True):
        matrix.set(5, task, score)
    summary = matrix.summary()
    assert round(summary["MFT"], 2) == 75.87
    assert round(summary["MFN"], 2) == 69.66
    assert round(summary["BWT"], 2) == -7.45
    assert round((69.66 - 75.87) * 6 / 5, 2) == -7.45
    assert summary["BWT_T"] == pytest.approx(summary["MFN"] - summary["MFT"])


def test_partial_runs():
    matrix = seen_matrix()
    first, second = matrix.summary(0), matrix.summary(1)
    assert (first["MFT"], first["MFN"], first["MAA"]) == (80, 80, 80)
    assert first["BWT"] is first["BWT_T"] is first["forgetting"] is first["FWT"] is None
    assert (second["MFT"], second["MFN"], second["MAA"], second["BWT"], second["BWT_T"]) == (85, 80, 80, -10, -5)
    matrix.scores[2] = [None] * 3
    assert matrix.summary() == second
    assert matrix.last_row() == 1
    assert set(matrix.summary(2).values()) == {None}


def test_an_empty_matrix_defines_nothing():
    assert set(TransferMatrix(TASKS).summary().values()) == {None}


def test_a_joint_run_has_a_final_mean_only():
    matrix = TransferMatrix(TASKS)
    for task, score in zip(TASKS, [60, 70, 80], strict=True):
        matrix.set(2, task, score)
    assert {name for name, value in matrix.summary().items() if value is not None} == {"MFN"}
    assert matrix.summary()["MFN"] == 70


def test_individual_models_have_a_just_learnt_mean_only():
    matrix = TransferMatrix(TASKS)
    for row, task in enumerate(TASKS):
        matrix.set(row, task, 60 + 10 * row)
    assert {name for name, value in matrix.summary().items() if value is not None} == {"MFT"}
    assert matrix.summary()["MFT"] == 70


def test_a_single_task_has_no_transfer():
    matrix = TransferMatrix(["only"])
    matrix.set(0, "only", 50)
    assert {name for name, value in matrix.summary().items() if value is not None} == {"MFT", "MFN", "MAA", "AVG"}


@pytest.mark.parametrize("make", [full_matrix, seen_matrix, lambda: TransferMatrix(TASKS)])
def test_json_round_trip(make):
    matrix = make()
    copy = TransferMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
    assert copy.to_dict() == matrix.to_dict()
    assert copy.summary() == matrix.summary()


@pytest.mark.parametrize(
    "values",
    [{}, {"tasks": ["a"], "matrix": [[1, 2]], "zero_shot": None}, {"tasks": ["a"], "matrix": 3, "zero_shot": None},
     {"tasks": ["a"], "matrix": [[1]], "zero_shot": []}, {"tasks": [], "matrix": [], "zero_shot": None}],
)  # fmt: skip
def test_malformed_json_is_refused(values):
    with pytest.raises(ValueError, match=r"matrix|zero-shot"):
        TransferMatrix.from_dict(values)


def test_wrong_entries_are_refused():
    matrix = TransferMatrix(TASKS)
    with pytest.raises(ValueError, match="unknown task 'z'; the matrix has: a, b, c"):
        matrix.set(0, "z", 1.0)
    with pytest.raises(ValueError, match="task 'a' is nan"):
        matrix.set(0, "a", math.nan)
    with pytest.raises(ValueError, match="every name once"):
        TransferMatrix(["a", "a"])
