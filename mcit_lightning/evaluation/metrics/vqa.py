"""Open questions with several people's answers, and answers that are read from the picture."""

from typing import Any

from mcit_lightning.evaluation.metrics.base import METRICS, AnswerMetric, references_of
from mcit_lightning.evaluation.text import edit_distance, m4c_clean, vqa_clean


@METRICS.register("vqa_soft")
class VqaSoft(AnswerMetric):
    """VQA accuracy: the mean over ten people of min(n / 3, 1), n being how many of the *other* nine gave this answer.

    Antol et al., "VQA: Visual Question Answering", ICCV 2015. Both sides are brought to the form of the VQA
    evaluation first: lower case, no articles and punctuation, digits for number words. The reference is a list of
    texts or of `{"answer": text}`.

    Published (CoIN's TextVQA, D-MoLE's VizWiz; the evaluator that came with M4C): exactly ten answers, and another form of
    the texts, `m4c_clean`, whose defects are named there.
    """

    published = "m4c_evaluator.py (CoIN: TextVQA), textvqa_eval.py (D-MoLE: vizwiz)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        members = reference if isinstance(reference, list | tuple) else []
        texts = [member.get("answer") if isinstance(member, dict) else member for member in members]
        published = self.mode == "published"
        if any(not isinstance(text, str | int | float) for text in texts) or len(texts) < 4:
            raise ValueError(
                f"vqa_soft compares with the answers of ten people (at least four), got {reference!r}; "
                "for a single answer use the metric exact_match"
            )
        if published and len(texts) != 10:
            raise ValueError(f"{self.published} takes exactly ten answers, got {len(texts)}; use metric_mode fixed")
        form = m4c_clean if published else vqa_clean
        answers, given = [form(str(text)) for text in texts], form(prediction)
        same = answers.count(given)
        if not same:
            return 0.0
        left_out = [min((same - (answer == given)) / 3, 1.0) for answer in answers]
        return sum(left_out) / len(left_out)


@METRICS.register("anls")
class Anls(AnswerMetric):
    """Normalised Levenshtein similarity to the best reference; 0 where less than half of the text is right.

    Biten et al., "Scene Text Visual Question Answering", ICCV 2019.

    Published (TriGap's DocVQA and InfographicVQA). Its defects: there is no threshold, so that a wrong answer of about the
    right length scores too; blanks inside count.
    """

    published = "eval_ucit.py (TriGap: DocVQA, InfographicVQA)"

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        if self.mode == "published":
            given = prediction.strip()
            return max(_similarity(given, answer.strip()) for answer in references_of(reference))
        given = " ".join(prediction.casefold().split())
        best = max(_similarity(given, " ".join(answer.casefold().split())) for answer in references_of(reference))
        return best if best > 0.5 else 0.0


def _similarity(one: str, two: str) -> float:
    length = max(len(one), len(two))
    return 1.0 - edit_distance(one.lower(), two.lower()) / length if length else 1.0
