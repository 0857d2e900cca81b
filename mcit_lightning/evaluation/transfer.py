"""The accuracy matrix of a task sequence and the numbers that papers print about it.

A[t][i] is the score (percent) on task i after training stage t, both counted from 1 to T in the formulas; a cell is
None where the task was not evaluated. z[i] is the score before any training.

The divisor of backward transfer is not agreed on, so both are named: `BWT` divides by T - 1 (GEM and MCITlib),
`BWT_T` by T (CoIN, BranchLoRA). References:

* GEM: Lopez-Paz & Ranzato, "Gradient Episodic Memory for Continual Learning", NeurIPS 2017.
* Chaudhry et al., "Riemannian Walk for Incremental Learning", ECCV 2018 (forgetting).
* CoIN: Chen et al., "CoIN: A Benchmark of Continual Instruction Tuning for Multimodal Large Language Models", NeurIPS
  2024.
* D-MoLE: Ge et al., "Dynamic Mixture of Curriculum LoRA Experts for Continual Multimodal Instruction Tuning", ICML
  2025 (AVG).
"""

import math
from collections.abc import Iterable
from typing import Any

SUMMARY = ("MFT", "MFN", "MAA", "BWT", "BWT_T", "AVG", "forgetting", "FWT")
"""Names of the summaries, in the order in which they are shown."""

Scores = list[float | None]


def _mean(values: Iterable[float | None]) -> float | None:
    """Mean, or None if a value is missing or there is none."""
    known: list[float] = []
    for value in values:
        if value is None:
            return None
        known.append(value)
    return sum(known) / len(known) if known else None


def _minus(one: float | None, two: float | None) -> float | None:
    return None if one is None or two is None else one - two


class TransferMatrix:
    """Scores of every task after every stage.

    Rows may be missing: a joint run fills only the last one, a run of individual models only the diagonal. A summary
    whose formula needs a missing cell is None, never a number over fewer cells.

    Args:
        tasks: names in the order in which they are learnt.

    Raises:
        ValueError: no task, or a name twice.
    """

    def __init__(self, tasks: list[str]) -> None:
        if not tasks or len(set(tasks)) != len(tasks):
            raise ValueError(f"an accuracy matrix needs at least one task and every name once, got {tasks}")
        self.tasks = list(tasks)
        self.scores: list[Scores] = [[None] * len(tasks) for _ in tasks]
        self.zero_shot: Scores | None = None

    def __len__(self) -> int:
        return len(self.tasks)

    def set(self, row: int, task: str, score: float) -> None:
        """Enter the score of a task after the stage of a row (0-based).

        Raises:
            ValueError: the task is unknown or the score is not a finite number.
        """
        assert 0 <= row < len(self), f"row {row} of a matrix of {len(self)} tasks"
        self.scores[row][self._column(task)] = self._finite(task, score)

    def set_zero_shot(self, task: str, score: float) -> None:
        """Enter the score of a task before any training.

        Raises:
            ValueError: as `set`.
        """
        column, value = self._column(task), self._finite(task, score)
        if self.zero_shot is None:
            self.zero_shot = [None] * len(self)
        self.zero_shot[column] = value

    def _column(self, task: str) -> int:
        if task not in self.tasks:
            raise ValueError(f"unknown task {task!r}; the matrix has: {', '.join(self.tasks)}")
        return self.tasks.index(task)

    @staticmethod
    def _finite(task: str, score: float) -> float:
        if not math.isfinite(score):
            raise ValueError(f"the score of task {task!r} is {score}: was any row of its test split evaluated?")
        return float(score)

    def filled_rows(self) -> list[int]:
        """Rows with a score: all of them in a finished sequence, the last one alone in a joint run."""
        return [row for row, scores in enumerate(self.scores) if any(score is not None for score in scores)]

    def last_row(self) -> int | None:
        """The last row with a score, or None before the first evaluation."""
        return max(self.filled_rows(), default=None)

    def learnt(self, task: str) -> float | None:
        """A[i][i]: score right after the task was learnt."""
        column = self._column(task)
        return self.scores[column][column]

    def final(self, task: str) -> float | None:
        """Score after the last evaluated stage."""
        row = self.last_row()
        return None if row is None else self.scores[row][self._column(task)]

    def mft(self, row: int) -> float | None:
        """Mean finetune score, the plasticity: MFT = 1/T sum_i A[i][i]."""
        return _mean(self.scores[i][i] for i in range(row + 1))

    def mfn(self, row: int) -> float | None:
        """Mean final score ("Last", "ACC"): MFN = 1/T sum_i A[T][i]."""
        return _mean(self.scores[row][: row + 1])

    def maa(self, row: int) -> float | None:
        """Mean average accuracy: MAA = 1/T sum_t (1/t sum_{i<=t} A[t][i])."""
        return _mean(self.mfn(t) for t in range(row + 1))

    def bwt(self, row: int) -> float | None:
        """Backward transfer (GEM): BWT = 1/(T-1) sum_{i<T} (A[T][i] - A[i][i]). Negative means forgetting."""
        return _mean(_minus(self.scores[row][i], self.scores[i][i]) for i in range(row))

    def bwt_t(self, row: int) -> float | None:
        """Backward transfer as CoIN prints it: BWT_T = 1/T sum_{i<=T} (A[T][i] - A[i][i]), whose last term is zero."""
        bwt = self.bwt(row)
        return None if bwt is None else bwt * row / (row + 1)

    def avg(self, row: int) -> float | None:
        """D-MoLE's average: AVG = 1/T^2 sum_t sum_i A[t][i], also over tasks not learnt yet (needs `evaluate: all`)."""
        return _mean(score for t in range(row + 1) for score in self.scores[t])

    def forgetting(self, row: int) -> float | None:
        """Forgetting (Chaudhry et al.): 1/(T-1) sum_{i<T} (max_{t<T} A[t][i] - A[T][i]).

        The maximum is over the stages before the last that evaluated the task; those from the task's own stage on
        must all be there.
        """
        drops: Scores = []
        for i in range(row):
            if any(self.scores[t][i] is None for t in range(i, row + 1)):
                return None
            best = max(score for t in range(row) if (score := self.scores[t][i]) is not None)
            drops.append(_minus(best, self.scores[row][i]))
        return _mean(drops)

    def fwt(self, row: int) -> float | None:
        """Forward transfer (GEM): FWT = 1/(T-1) sum_{i>1} (A[i-1][i] - z[i]) (needs `evaluate: all` and zero-shot)."""
        if self.zero_shot is None:
            return None
        return _mean(_minus(self.scores[i - 1][i], self.zero_shot[i]) for i in range(1, row + 1))

    def summary(self, upto_row: int | None = None) -> dict[str, float | None]:
        """All summaries as if the sequence ended with a row; None where undefined.

        Args:
            upto_row: 0-based row; None means the last one with a score.
        """
        row = self.last_row() if upto_row is None else upto_row
        if row is None or not any(score is not None for score in self.scores[row]):
            return dict.fromkeys(SUMMARY)
        functions = (self.mft, self.mfn, self.maa, self.bwt, self.bwt_t, self.avg, self.forgetting, self.fwt)
        return {name: function(row) for name, function in zip(SUMMARY, functions, strict=True)}

    def to_dict(self) -> dict[str, Any]:
        """JSON form: `tasks`, `matrix` (T rows of T, null where not evaluated), `zero_shot` (T scores or null)."""
        return {
            "tasks": list(self.tasks),
            "matrix": [list(row) for row in self.scores],
            "zero_shot": None if self.zero_shot is None else list(self.zero_shot),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "TransferMatrix":
        """Inverse of `to_dict`.

        Raises:
            ValueError: a key is missing or a row has another length than there are tasks.
        """
        try:
            matrix = cls(values["tasks"])
            rows, zero_shot = values["matrix"], values["zero_shot"]
            if [len(row) for row in rows] != [len(matrix)] * len(matrix):
                raise ValueError(f"the matrix is not {len(matrix)} rows of {len(matrix)} scores")
            if zero_shot is not None and len(zero_shot) != len(matrix):
                raise ValueError(f"the zero-shot row has {len(zero_shot)} scores for {len(matrix)} tasks")
        except (KeyError, TypeError) as error:
            raise ValueError(f"not an accuracy matrix: {type(error).__name__} {error}") from error
        matrix.scores = [[None if score is None else float(score) for score in row] for row in rows]
        matrix.zero_shot = (
            None if zero_shot is None else [None if score is None else float(score) for score in zero_shot]
        )
        return matrix
