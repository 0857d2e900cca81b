"""How an answer is scored: one small class per metric, looked up by the name that a task's `metric` key gives.

A new metric is a subclass of `AnswerMetric` with a `score` method and a line `@METRICS.register("name")`.
"""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from mcit_lightning.evaluation.text import clean, edit_distance, vqa_clean
from mcit_lightning.registry import Registry


class AnswerMetric(Metric):
    """Mean score of the answers of one task, in percent.

    The states are a sum and a count, so the value over several ranks is the exact mean over all rows, however they
    are split. Float64 keeps the sum exact enough that it does not depend on the order of the rows.
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        """Score of one row, between 0 and 1.

        Args:
            prediction: the generated text.
            reference: the answer as the test file holds it; a list means that any of its members is right.
            extra: the other keys of the row.

        Raises:
            ValueError: the reference is of a kind that this metric cannot use.
        """
        raise NotImplementedError

    def check(self, reference: Any, extra: dict[str, Any]) -> None:
        """Refuse a reference that `score` could not use, so that bad data is found before any training.

        Raises:
            ValueError: as `score`.
        """
        self.score("", reference, extra)

    def update(self, predictions: Sequence[str], references: Sequence[Any], extras: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a batch."""
        for prediction, reference, extra in zip(predictions, references, extras, strict=True):
            self.total += self.score(prediction, reference, extra)
            self.count += 1

    def compute(self) -> Tensor:
        """Mean score in percent; NaN if no row was added."""
        return 100.0 * self.total / self.count


METRICS: Registry[AnswerMetric] = Registry("metric")


def get_metric(name: str) -> type[AnswerMetric]:
    """The class of the metric called `name`.

    Raises:
        ValueError: there is none; the message names the nearest known one.
    """
    return METRICS.get(name)


def _references(reference: Any) -> list[str]:
    """The right answers as texts, whether the file holds one or a list of them."""
    answers = reference if isinstance(reference, list | tuple) else [reference]
    if not answers or any(answer is None or isinstance(answer, dict | list) for answer in answers):
        raise ValueError(f"the answer must be a text, a number or a non-empty list of them, got {reference!r}")
    return [str(answer) for answer in answers]


@METRICS.register("exact_match")
class ExactMatch(AnswerMetric):
    """1 if the answer equals a reference, without regard to case, outer blanks and a trailing full stop."""

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        return float(clean(prediction) in {clean(answer) for answer in _references(reference)})


@METRICS.register("contains")
class Contains(AnswerMetric):
    """1 if a reference occurs in the answer as whole words: "no" does not occur in "I do not know"."""

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        text = clean(prediction)
        answers = [clean(answer) for answer in _references(reference)]
        return float(any(answer and re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) for answer in answers))


@METRICS.register("option_letter")
class OptionLetter(AnswerMetric):
    """1 if the answer names the right option of a multiple-choice question.

    Understood are `B`, `(b)`, `B. a red car`, `The answer is B`, and the text of an option where the row lists its
    options under `choices` or `options`. The reference is a letter (`B`, `(B)`, `B. a red car`) or the 0-based number
    of the option.
    """

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        choices = extra.get("choices") or extra.get("options") or []
        texts = list(choices.values()) if isinstance(choices, dict) else list(choices)
        if isinstance(reference, int) and not isinstance(reference, bool) and 0 <= reference < 26:
            right = chr(ord("A") + reference)
        else:
            right = option_letter(str(reference), texts)
        if not right:
            raise ValueError(f"the answer must name an option by its letter or 0-based number, got {reference!r}")
        return float(option_letter(prediction, texts) == right)


def option_letter(text: str, choices: Sequence[Any] = ()) -> str:
    """The upper-case letter of the option that a text names; empty if it names none."""
    for number, choice in enumerate(choices):
        if clean(text) == clean(str(choice)):
            return chr(ord("A") + number)
    patterns = (
        r"^\s*\(?([A-Za-z])\)?\s*(?:[.:),]|$)",  # B   (B)   B.   B: red   b) red
        r"\(([A-Za-z])\)",  # ... (B)
        r"(?i:\b(?:answer|option|choice)(?:\s+is)?)\s*:?\s*([A-Za-z])\b",  # the answer is B
        r"\b([B-HJ-Z])\b",  # B red; A and I are words, so they count only at the end
        r"\b([AI])\W*$",
    )
    for pattern in patterns:
        if found := re.search(pattern, text):
            return found.group(1).upper()
    return ""


@METRICS.register("vqa_soft")
class VqaSoft(AnswerMetric):
    """VQA accuracy: the mean over ten people of min(n / 3, 1), n being how many of the *other* nine gave this answer.

    Antol et al., "VQA: Visual Question Answering", ICCV 2015. Both sides are brought to the form of the VQA
    evaluation first: lower case, no articles and punctuation, digits for number words. The reference is a list of
    texts or of `{"answer": text}`.
    """

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        members = reference if isinstance(reference, list | tuple) else []
        answers = [vqa_clean(str(member["answer"] if isinstance(member, dict) else member)) for member in members]
        if len(answers) < 4:
            raise ValueError(
                f"vqa_soft compares with the answers of ten people (at least four), got {reference!r}; "
                "for a single answer use the metric exact_match"
            )
        given = vqa_clean(prediction)
        same = answers.count(given)
        left_out = [min((same - (answer == given)) / 3, 1.0) for answer in answers]
        return sum(left_out) / len(left_out)


@METRICS.register("anls")
class Anls(AnswerMetric):
    """Normalised Levenshtein similarity to the best reference; 0 where less than half of the text is right.

    Biten et al., "Scene Text Visual Question Answering", ICCV 2019.
    """

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        given = " ".join(prediction.casefold().split())
        best = 0.0
        for answer in _references(reference):
            right = " ".join(answer.casefold().split())
            length = max(len(given), len(right))
            best = max(best, 1.0 - edit_distance(given, right) / length if length else 1.0)
        return best if best > 0.5 else 0.0


@METRICS.register("iou")
class BoxIou(AnswerMetric):
    """1 if the box that the answer names overlaps the reference with an intersection over union of at least 0.5.

    Boxes are x1, y1, x2, y2 in one of two forms: fractions of the picture (`[0.1, 0.2, 0.5, 0.9]`) or thousandths of
    it (`<box>[[100, 200, 500, 900]]</box>`); a box with a number above 1 is in thousandths. A reference in pixels is
    accepted where the row has `width` and `height`.
    """

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        right = parse_box(reference)
        if right is None:
            raise ValueError(
                f"the answer must be a box of four numbers x1, y1, x2, y2 with x1 < x2 and y1 < y2, got {reference!r}"
            )
        if max(right) > 1.0:
            width, height = float(extra.get("width", 1000)), float(extra.get("height", 1000))
            right = (right[0] / width, right[1] / height, right[2] / width, right[3] / height)
        given = parse_box(prediction)
        if given is None:
            return 0.0
        scale = 1000.0 if max(given) > 1.0 else 1.0
        return float(box_iou((given[0] / scale, given[1] / scale, given[2] / scale, given[3] / scale), right) >= 0.5)


Box = tuple[float, float, float, float]


def parse_box(value: Any) -> Box | None:
    """The first four numbers of a text or list as a box; None if there are fewer or they span no area."""
    text = value if isinstance(value, str) else repr(value)
    numbers = [float(number) for number in re.findall(r"(?<![\w.])-?(?:\d+\.?\d*|\.\d+)", text)[:4]]
    if len(numbers) < 4:
        return None
    left, top, right, bottom = numbers
    return (left, top, right, bottom) if left < right and top < bottom else None


def box_iou(one: Box, two: Box) -> float:
    """Area of the intersection of two boxes over the area of their union."""
    width = min(one[2], two[2]) - max(one[0], two[0])
    height = min(one[3], two[3]) - max(one[1], two[1])
    shared = max(width, 0.0) * max(height, 0.0)
    area = (one[2] - one[0]) * (one[3] - one[1]) + (two[2] - two[0]) * (two[3] - two[1])
    return shared / (area - shared)
