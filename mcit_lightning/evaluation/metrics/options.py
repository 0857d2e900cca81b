"""Multiple choice."""

import re
from collections.abc import Sequence
from typing import Any

from mcit_lightning.evaluation.metrics.base import METRICS, AnswerMetric
from mcit_lightning.evaluation.text import clean

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@METRICS.register("option_letter")
class OptionLetter(AnswerMetric):
    """1 if the answer names the right option of a multiple-choice question.

    Understood are `B`, `(b)`, `B. a red car`, `The answer is B`, and the text of an option where the row lists its
    options under `choices` or `options`. The reference is a letter (`B`, `(B)`, `B. a red car`) or the 0-based number
    of the option.

    Published (D-MoLE's IconQA and PMC-VQA): the answer's one character, else its first where that is an option's letter,
    else the letter of the first option whose text is part of the answer. Its defects: one lower-case letter is wrong; "A
    dog" is A; parts of words count; and **the options of the first row of a batch are used for the whole batch**, so the
    score depends on the batches. `scores` and `update` take what they are given as one batch; `score` is a batch of one.
    """

    published = "evaluate_multi_choice.py (D-MoLE: iconqa, pmcvqa)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        choices = choices_of(extra)
        right = right_letter(reference, choices)
        if self.mode == "published":
            return float(_published_letter(prediction, self._options(extra)) == right)
        return float(option_letter(prediction, choices) == right)

    def scores(
        self, predictions: Sequence[str], references: Sequence[Any], extras: Sequence[dict[str, Any]]
    ) -> list[float]:
        """Scores of the rows of a batch; published: with the options of its first row."""
        if self.mode == "fixed" or not extras:
            return super().scores(predictions, references, extras)
        options = self._options(extras[0])
        return [
            float(_published_letter(prediction, options) == right_letter(reference, choices_of(extra)))
            for prediction, reference, extra in zip(predictions, references, extras, strict=True)
        ]

    def _options(self, extra: dict[str, Any]) -> list[str]:
        choices = choices_of(extra)
        if not choices:
            raise ValueError(f"{self.published} needs the row's `choices`; use metric_mode fixed")
        return [str(choice) for choice in choices]


@METRICS.register("scienceqa")
class ScienceQa(AnswerMetric):
    """1 if the answer names the right option of a ScienceQA question, as `option_letter`.

    Published (CoIN's ScienceQA): an answer that is a letter from A to E, or begins with one and ". "; otherwise the first
    single letter or digit that stands alone, in upper case. Its defects: "I think it is B" is "I", "a cat" is A; the answer
    counts as wrong unless the letter is one of the question's own options, of which there may be five at most. A missing
    prediction is wrong, as it is here.
    """

    published = "eval_science_qa.py (CoIN)"
    published_counts_missing = True

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        choices = choices_of(extra)
        right = right_letter(reference, choices)
        if self.mode == "fixed":
            return float(option_letter(prediction, choices) == right)
        options = LETTERS[:5]
        if prediction and prediction in list(options):
            letter = prediction
        elif len(prediction) >= 3 and prediction[0] in options and prediction[1:3] == ". ":
            letter = prediction[0]
        else:
            alone = re.search(r"\b(\w)\b", prediction)
            letter = "" if alone is None else alone[1].upper()
        return float(letter == right and letter in options[: len(choices) or len(options)])


def choices_of(extra: dict[str, Any]) -> list[Any]:
    """The options of a row, from `choices` or `options`; empty where it lists none.

    Raises:
        ValueError: they are neither a list nor an object.
    """
    choices = extra.get("choices") or extra.get("options") or []
    if isinstance(choices, dict):
        return list(choices.values())
    if not isinstance(choices, list | tuple) or len(choices) > len(LETTERS):
        raise ValueError(f"`choices` must be a list of at most {len(LETTERS)} options, got {choices!r}")
    return list(choices)


def right_letter(reference: Any, choices: Sequence[Any]) -> str:
    """The letter of the right option, from a letter, a text or a 0-based number.

    Raises:
        ValueError: the reference names no option.
    """
    if isinstance(reference, int) and not isinstance(reference, bool) and 0 <= reference < len(LETTERS):
        letter = LETTERS[reference]
    else:
        letter = option_letter(str(reference), choices)
    if not letter or (choices and LETTERS.index(letter) >= len(choices)):
        many = f" of its {len(choices)} options" if choices else ""
        raise ValueError(f"the answer must name an option{many} by its letter or 0-based number, got {reference!r}")
    return letter


def option_letter(text: str, choices: Sequence[Any] = ()) -> str:
    """The upper-case letter of the option that a text names; empty if it names none."""
    for number, choice in enumerate(choices):
        if clean(text) == clean(str(choice)):
            return LETTERS[number]
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


def _published_letter(prediction: str, options: Sequence[str]) -> str:
    text = prediction.strip()
    if len(text) > 1 and text[0] in LETTERS[: len(options)]:
        return text[0]
    if len(text) > 1:
        return next((LETTERS[number] for number, option in enumerate(options) if option in text), text)
    return text
