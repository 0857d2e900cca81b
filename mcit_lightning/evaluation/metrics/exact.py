"""Answers that must equal the right one."""

from typing import Any

from mcit_lightning.evaluation.metrics.base import METRICS, AnswerMetric, references_of, single_text
from mcit_lightning.evaluation.text import clean, contains_words


@METRICS.register("exact_match")
class ExactMatch(AnswerMetric):
    """1 if the answer equals a reference, without regard to case, outer blanks and a trailing full stop.

    Published (`pred.upper() == answer.upper()`; UCIT's ImageNet-R, ArxivQA, IconQA and CLEVR, CoIN's VizWiz and VQAv2,
    TriGap). Its defects: a blank or full stop at either end makes an answer wrong; only one answer can be right.
    """

    published = "eval_deepseek_r1.py (UCIT, TriGap), eval_vizwiz.py and eval_vqav2.py (CoIN)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            return float(prediction.upper() == single_text(reference, self.published).upper())
        return float(clean(prediction) in {clean(answer) for answer in references_of(reference)})


@METRICS.register("exact_any")
class ExactAny(AnswerMetric):
    """1 if the answer equals any of several references, as `exact_match`.

    Published (D-MoLE's OCR-VQA and KVQA, InternVL's `accuracy`): the same without the full stop, whose presence makes an
    answer wrong.
    """

    published = "evaluate_vqa.py, metric accuracy (D-MoLE: ocrvqa, kvqa)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        answers = references_of(reference)
        if self.mode == "published":
            return float(prediction.strip().lower() in {answer.strip().lower() for answer in answers})
        return float(clean(prediction) in {clean(answer) for answer in answers})


@METRICS.register("ocrvqa")
class OcrVqa(AnswerMetric):
    """1 if the answer equals the reference, as `exact_match`.

    Published (CoIN's OCR-VQA). Its defects: blanks and a full stop count; an answer with "Unanswerable" in it is wrong even
    where that is the right answer; it prints "Samples: 0", the length of a list that it never fills.
    """

    published = "eval_ocrvqa.py (CoIN)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            right = single_text(reference, self.published).lower()
            return float("Unanswerable" not in prediction and prediction.lower() == right)
        return float(clean(prediction) in {clean(answer) for answer in references_of(reference)})


@METRICS.register("gqa")
class Gqa(AnswerMetric):
    """1 if the answer equals the reference, as `exact_match`: GQA's accuracy (Hudson & Manning, CVPR 2019).

    Published (CoIN and InternVL convert the answers, then GQA's own script compares). Its defects: the answer is put in
    lower case but not the reference, so "US" is never right; blanks at either end make an answer wrong; all full stops at
    the end are dropped. Questions without a prediction are left out of the mean there; here there are none in a run.
    """

    published = "convert_gqa_for_eval.py and eval_gqa.py (CoIN)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            return float(prediction.rstrip(".").lower() == single_text(reference, self.published))
        return float(clean(prediction) in {clean(answer) for answer in references_of(reference)})


@METRICS.register("class_name")
class ClassName(AnswerMetric):
    """1 if the answer names the class: it is one of the reference's names or has one in it as whole words.

    The names of ImageNet's classes are separated by commas ("tench, Tinca tinca").

    Published (CoIN's ImageNet): 1 if one text is part of the other. Its defects: an empty answer, and any other part of
    the name such as "e", is right; case counts; the n-th prediction is compared with the n-th question, whatever their ids.
    """

    published = "eval_ImagetNet.py (CoIN)"
    published_by_line = True

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            right = single_text(reference, self.published)
            return float(right in prediction or prediction in right)
        names = [name for answer in references_of(reference) for name in (answer, *answer.split(","))]
        return float(any(contains_words(clean(prediction), clean(name)) for name in names))


@METRICS.register("finvis")
class FinVis(AnswerMetric):
    """1 if the answer equals the reference, without regard to case, blanks and full stops (letters, yes or no).

    Published (MLLM-CL's Fin, StockQA). Its defects: blanks and full stops are dropped from the answer but not from the
    reference, so a reference with one is never met; an answer with "Unanswerable" in it is wrong.
    """

    published = "eval_finvis.py (MLLM-CL: Fin)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            right = single_text(reference, self.published).lower()
            given = prediction.lower().replace(" ", "").replace(".", "")
            return float("Unanswerable" not in prediction and given == right)
        return float(_bare(prediction) in {_bare(answer) for answer in references_of(reference)})


def _bare(text: str) -> str:
    return "".join(text.casefold().split()).replace(".", "")
