"""Answers in which the right one must occur."""

import re
from typing import Any

from mcit_lightning.evaluation.metrics.base import METRICS, AnswerMetric, references_of, single_text
from mcit_lightning.evaluation.metrics.options import option_letter
from mcit_lightning.evaluation.text import clean, contains_words


@METRICS.register("contains")
class Contains(AnswerMetric):
    """1 if a reference occurs in the answer as whole words: "no" does not occur in "I do not know".

    Published (MLLM-CL's Med, PathVQA): 1 if the reference is part of the answer, in lower case. Its defects: parts of words
    count ("no" in "I do not know"); an answer with "Unanswerable" in it is wrong.
    """

    published = "eval_pvqa.py (MLLM-CL: Med)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            right = single_text(reference, self.published).lower()
            return float("Unanswerable" not in prediction and right in prediction.lower())
        return _any_words(prediction, reference)


@METRICS.register("contains_loosely")
class ContainsLoosely(AnswerMetric):
    """1 if a reference occurs in the answer as whole words, as `contains`.

    Published (MLLM-CL's RS and AD). A reference of several words must be part of the answer. One word, its full stops
    dropped, must be part of an answer of one word, or stand next to a blank, full stop or comma in a longer one. Its
    defects: parts of words count ("no" in "nothing", "is" in "this one"); an answer with "Unanswerable" in it is wrong.
    """

    published = "eval_ai2d.py (MLLM-CL: RS, AD)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "fixed":
            return _any_words(prediction, reference)
        right, given = single_text(reference, self.published).lower(), prediction.lower()
        if "Unanswerable" in prediction:
            return 0.0
        if " " in right:
            return float(right in given)
        right = right.replace(".", "")
        if " " not in given:
            return float(right in given)
        return float(any(form in given for form in (f" {right}", f"{right} ", f"{right}.", f"{right},")))


@METRICS.register("science")
class Science(AnswerMetric):
    """MLLM-CL's Sci, whose rows come from several data sets: the name of the image file says from which.

    `AI2D_`, `TQA_`, `VQA_` and `SciVerse_` ask for the exact answer. The rest (MapQA) asks either "Which states ...", scored
    by the overlap of the two lists of states (intersection over union), or for an answer that has the reference in it as
    whole words.

    Published. Its defects: blanks and a full stop count; the lists are split at commas only, so "a, b" shares one state with
    "a,b"; states too many cost nothing, so naming all of them scores 1; parts of words count; an answer with
    "Unanswerable" in it is wrong.
    """

    published = "eval_sci.py (MLLM-CL: Sci)"
    EXACT = frozenset({"AI2D", "TQA", "VQA", "SciVerse"})

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        image, text = extra.get("image"), extra.get("text")
        if not isinstance(image, str) or not isinstance(text, str):
            raise ValueError(f"science needs the row's `image` and `text`, got {image!r} and {text!r}")
        right = single_text(reference, "science")
        published = self.mode == "published"
        if published and "Unanswerable" in prediction:
            return 0.0
        if image.split("/")[-1].split("_")[0] in self.EXACT:
            same = prediction.lower() == right.lower() if published else clean(prediction) == clean(right)
            return float(same)
        if "Which states" in text:
            return self._states(prediction, right)
        return float(right.lower() in prediction.lower()) if published else _any_words(prediction, right)

    def group(self, extra: dict[str, Any]) -> str | None:
        name = str(extra.get("image", "")).split("/")[-1].split("_")[0]
        return name if name in self.EXACT else "MapQA"

    def _states(self, prediction: str, right: str) -> float:
        if self.mode == "published":
            listed, wanted = prediction.lower().split(","), right.lower().split(",")
            return sum(state in listed for state in wanted) / len(wanted)
        given, asked = ({clean(state) for state in text.split(",")} - {""} for text in (prediction, right))
        return len(given & asked) / len(given | asked) if asked else float(not given)


OCR_RECOGNITION = (
    "Regular Text Recognition",
    "Irregular Text Recognition",
    "Artistic Text Recognition",
    "Handwriting Recognition",
    "Digit String Recognition",
    "Non-Semantic Text Recognition",
)
OCR_FORMULA = "Handwritten Mathematical Expression Recognition"
OCR_CATEGORIES = (
    *OCR_RECOGNITION,
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Key Information Extraction",
    OCR_FORMULA,
)


@METRICS.register("ocrbench")
class OcrBench(AnswerMetric):
    """1 if any reference occurs in the answer, line breaks left out; formulas (`answer_type` "Handwritten Mathematical
    Expression Recognition") without any blank and with their case. OCRBench (Liu et al., 2024), mean in percent.

    Published (MLLM-CL's OCR): the same per row. Its defects: the sum of hits is divided by 10, which is a percentage only
    of OCRBench's 1,000 rows; an empty reference is always right.
    """

    published = "eval_ocr.py (MLLM-CL: OCR)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        category = extra.get("answer_type")
        if category not in OCR_CATEGORIES:
            raise ValueError(f"`answer_type` must be one of {', '.join(OCR_CATEGORIES)}; got {category!r}")
        answers = references_of(reference)
        formula = category == OCR_FORMULA
        given_answers = reference if isinstance(reference, list) else [reference]
        if self.mode == "published" and not all(isinstance(answer, str) for answer in given_answers):
            raise ValueError(f"{self.published} takes texts as answers, got {reference!r}; use metric_mode fixed")
        given = _ocr_form(prediction, formula)
        forms = [_ocr_form(answer, formula) for answer in answers]
        return float(any((form or self.mode == "published") and form in given for form in forms))

    def group(self, extra: dict[str, Any]) -> str | None:
        category = str(extra.get("answer_type"))
        return "Text Recognition" if category in OCR_RECOGNITION else category

    def compute(self) -> Any:
        """Mean in percent; published: a tenth of the number of hits."""
        return self.total / 10.0 if self.mode == "published" else super().compute()


def _ocr_form(text: str, formula: bool) -> str:
    text = text.strip().replace("\n", "")
    return text.replace(" ", "") if formula else text.lower()


@METRICS.register("cv_bench")
class CvBench(AnswerMetric):
    """1 if the answer names the right option, "(B)", or has the reference in it as whole words (CV-Bench; MLLM-CL's VP).

    Scores by `task` ("Count", ...) are reported too.

    Published: 1 if the reference is part of the answer, both in lower case and without blanks, line breaks and full stops.
    Its defects: a number is right where it is part of another ("1" in "12"), and so is a letter ("a" in "cat").
    """

    published = "eval_sat.py (MLLM-CL: VP)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            given, right = (
                text.lower().strip().replace(" ", "").replace("\n", "").replace(".", "")
                for text in (prediction, single_text(reference, self.published))
            )
            return float(right in given)
        if isinstance(reference, str) and (letter := re.fullmatch(r"\s*\(?([A-Za-z])\)?\.?\s*", reference)):
            return float(option_letter(prediction) == letter[1].upper())
        return _any_words(prediction, reference)

    def group(self, extra: dict[str, Any]) -> str | None:
        return None if extra.get("task") is None else str(extra["task"])


def _any_words(prediction: str, reference: Any) -> float:
    return float(any(contains_words(clean(prediction), clean(answer)) for answer in references_of(reference)))
