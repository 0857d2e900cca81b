"""Replies of a judge."""

import re
from typing import Any

from mcit_lightning.evaluation.metrics.base import METRICS, AnswerMetric


@METRICS.register("judge_score")
class JudgeScore(AnswerMetric):
    """A tenth of the points that a judge's reply gives: the first number between 0 and 10 in it, 0 if there is none.

    The predictions are the judge's replies; there is no right answer. See `mcit_lightning.evaluation.judge`.

    Published (CoIN's reasoning score, where the total is rounded to whole percent): a reply that is a number up to 10; else
    what comes before a "/", if it is a whole number up to 10; else the first digit from 1 to 9. Its defects: "Score: 10" and
    "10 points" are 1 point, "7.5/10" is none, and a negative number is taken off.
    """

    published = "evaluate_score.py (CoIN)"
    needs_reference = False

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        points = _published(prediction) if self.mode == "published" else _first(prediction)
        return points / 10.0

    def check(self, reference: Any, extra: dict[str, Any]) -> None:
        """Any row will do."""


def _first(text: str) -> float:
    numbers = (float(number) for number in re.findall(r"(?<![\d.])\d+(?:\.\d+)?", text))
    return next((number for number in numbers if number <= 10), 0.0)


def _published(text: str) -> float:
    try:
        number = float(text)
        return number if number <= 10.0 else 0.0
    except ValueError:
        pass
    if "/" in text:
        before = text.split("/")[0]
        return float(before) if before.isdecimal() and float(before) <= 10.0 else 0.0
    digit = re.search("[1-9]", text)
    return float(digit[0]) if digit else 0.0
