"""Where the published scorers and the fixed ones differ, on rows made by hand: each defect that a docstring names has a row."""

from typing import Any

import pytest
import torch

from mcit_lightning.config import TaskConfig
from mcit_lightning.evaluation.metrics import METRICS, AnswerMetric, build_metric, check_metric, get_metric, task_metric
from mcit_lightning.evaluation.metrics.caption import CaptionMetric
from mcit_lightning.evaluation.text import m4c_clean, vqa_clean

TEN = ["a dog"] * 5 + ["dogs"] * 5
MAP = {"image": "images/mapqa_2.png", "text": "Which states are blue?"}
TQA = {"image": "images/TQA_2.png", "text": "What is it?"}
FORMULA = {"answer_type": "Handwritten Mathematical Expression Recognition"}
SCENE = {"answer_type": "Scene Text-centric VQA"}
PIXELS = {"width": 100, "height": 200}

# metric, prediction, reference, further keys, fixed, published
ROWS: list[tuple[str, str, Any, dict[str, Any], float, float]] = [
    # UCIT, CoIN's VizWiz and VQAv2, TriGap
    ("exact_match", "Goldfish", "goldfish", {}, 1, 1),
    ("exact_match", "goldfish.", "goldfish", {}, 1, 0),
    ("exact_match", " goldfish", "goldfish", {}, 1, 0),
    ("exact_any", " Dune", ["x", "dune"], {}, 1, 1),
    ("exact_any", "Dune.", ["x", "dune"], {}, 1, 0),
    ("ocrvqa", "Jane Doe", "jane doe", {}, 1, 1),
    ("ocrvqa", "Unanswerable", "Unanswerable", {}, 1, 0),
    ("ocrvqa", "jane doe.", "jane doe", {}, 1, 0),
    ("gqa", "No..", "no", {}, 0, 1),
    ("gqa", "US", "US", {}, 1, 0),
    ("gqa", "no ", "no", {}, 1, 0),
    ("class_name", "a tench in water", "tench", {}, 1, 1),
    ("class_name", "", "tench", {}, 0, 1),
    ("class_name", "e", "tench", {}, 0, 1),
    ("class_name", "Tench", "tench", {}, 1, 0),
    ("class_name", "It is a Tinca tinca.", "tench, Tinca tinca", {}, 1, 0),
    ("finvis", " Y e s.", "Yes", {}, 1, 1),
    ("finvis", "A.", "A.", {}, 1, 0),
    ("finvis", "Unanswerable", "unanswerable", {}, 1, 0),
    ("contains", "it is benign", "benign", {}, 1, 1),
    ("contains", "I do not know", "no", {}, 0, 1),
    ("contains", "Unanswerable: benign", "benign", {}, 1, 0),
    ("contains_loosely", "the red car", "red car", {}, 1, 1),
    ("contains_loosely", "nothing here", "no", {}, 0, 0),  # not at the start of the answer
    ("contains_loosely", "see nothing", "no", {}, 0, 1),
    ("contains_loosely", "this one", "is", {}, 0, 1),
    ("contains_loosely", "unknown", "no", {}, 0, 1),
    ("contains_loosely", "Unanswerable, yes", "yes", {}, 1, 0),
    ("science", "Leaf", "leaf", TQA, 1, 1),
    ("science", "leaf.", "leaf", TQA, 1, 0),
    ("science", "Ohio,Texas", "Ohio,Texas", MAP, 1, 1),
    ("science", "Ohio, Texas", "Ohio,Texas", MAP, 1, 0.5),
    ("science", "ohio,texas,utah,iowa", "Ohio,Texas", MAP, 0.5, 1),
    ("science", "Unanswerable", "Ohio", {**MAP, "text": "How many?"}, 0, 0),
    ("science", "snow", "no", {**MAP, "text": "Is it?"}, 0, 1),
    ("ocrbench", "it says CEN\nTRE", ["x", "centre"], SCENE, 1, 1),
    ("ocrbench", "x^{ 2 }", "x ^ {2}", FORMULA, 1, 1),
    ("ocrbench", "X^{2}", "x^{2}", FORMULA, 0, 0),
    ("ocrbench", "anything", "", SCENE, 0, 1),
    ("cv_bench", "(B) 2", "(B)", {}, 1, 1),
    ("cv_bench", "there are 12", "1", {}, 0, 1),
    ("cv_bench", "a cat", "b", {}, 0, 0),
    ("cv_bench", "cab", "b", {}, 0, 1),
    ("option_letter", "B", 1, {"choices": ["3", "9"]}, 1, 1),
    ("option_letter", "b", 1, {"choices": ["3", "9"]}, 1, 0),
    ("option_letter", "A dog", 0, {"choices": ["cat", "dog"]}, 0, 1),
    ("option_letter", "it is 39", 0, {"choices": ["3", "9"]}, 0, 1),
    ("scienceqa", "The answer is B", 1, {"choices": ["x", "y"]}, 1, 1),
    ("scienceqa", "I think it is B", 1, {"choices": ["x", "y"]}, 1, 0),
    ("scienceqa", "a cat", 0, {"choices": ["x", "y"]}, 0, 1),
    ("scienceqa", "(F)", 5, {"choices": ["a"] * 3 + ["x", "y", "z"]}, 1, 0),
    ("vqa_soft", "a dog", TEN, {}, 1, 1),
    ("vqa_soft", "dog's", [*["dogs"] * 10], {}, 1, 0),
    ("vqa_soft", "half-full - yes", ["half full yes"] * 10, {}, 1, 0),
    ("anls", "kitten", ["sitting"], {}, 4 / 7, 4 / 7),
    ("anls", "abcd", ["axyz"], {}, 0, 0.25),
    ("iou", "<box>[[100, 200, 500, 900]]</box>", [10, 40, 50, 180], PIXELS, 1, 1),
    ("iou", "0.1, 0.2, 0.5, 0.9", [10, 40, 50, 180], PIXELS, 1, 0),
    ("iou", "[0, 0, 1, 2]", [0, 0, 100, 200], PIXELS, 0, 1),
    ("iou", "[0.5, 0.9, 0.1, 0.2]", [10, 40, 50, 180], PIXELS, 0, 0),
    ("coin_grounding", "[0.1,0.2,0.5,0.9]", "[0.1,0.2,0.5,0.9]", {"size": [640, 480]}, 1, 0),
    ("coin_grounding", "[0.10,0.20,0.50,0.90]", "[0.1,0.2,0.5,0.9]", {"size": [640, 480]}, 1, 1),
    ("coin_grounding", "[1,0,1,1]", "[0.1,0.2,0.5,0.9]", {"size": [640, 480]}, 0, 0),
    ("coin_grounding", "The box is [0.10,0.20,0.50,0.90]", "[0.1,0.2,0.5,0.9]", {}, 1, 0),
    ("judge_score", "8", None, {}, 0.8, 0.8),
    ("judge_score", "Score: 10", None, {}, 1, 0.1),
    ("judge_score", "7.5/10", None, {}, 0.75, 0),
    ("judge_score", "-3", None, {}, 0.3, -0.3),
    ("judge_score", "good", None, {}, 0, 0),
]


@pytest.mark.parametrize(("name", "prediction", "reference", "extra", "fixed", "published"), ROWS)
def test_fixed_and_published(
    name: str, prediction: str, reference: Any, extra: dict[str, Any], fixed: float, published: float
) -> None:
    for mode, expected in (("fixed", fixed), ("published", published)):
        metric = build_metric(name, mode)  # type: ignore[arg-type]
        metric.check(reference, extra)
        assert metric.score(prediction, reference, extra) == pytest.approx(expected), mode
        metric.update([prediction], [reference], [extra])
        if name != "ocrbench":
            assert metric.compute().item() == pytest.approx(100 * expected), mode


def test_every_published_mode_has_a_row_that_tells_it_from_the_fixed_one() -> None:
    different = {name for name, *_, fixed, published in ROWS if fixed != published}
    with_mode = {name for name in METRICS if get_metric(name).published}
    captions = {name for name in with_mode if issubclass(get_metric(name), CaptionMetric)}  # test_metrics_captions.py
    assert with_mode - captions == different


def test_metrics_of_ones_own_have_no_published_mode() -> None:
    @METRICS.register("only_here")
    class OnlyHere(AnswerMetric):
        def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
            return 1.0

    try:
        assert build_metric("only_here").score("", None, {}) == 1.0
        with pytest.raises(ValueError, match="'only_here' has no mode 'published'"):
            check_metric(TaskConfig(metric="only_here", metric_mode="published"))
        with pytest.raises(ValueError, match=r"'only_here' does not take \{'side': 3\}"):
            task_metric(TaskConfig(metric="only_here", metric_args={"side": 3}))
        with pytest.raises(ValueError, match="'fixed' or 'published', got 'x'"):
            OnlyHere(mode="x")  # type: ignore[arg-type]
    finally:
        METRICS._entries.pop("only_here")


@pytest.mark.parametrize(
    ("name", "reference", "extra", "said"),
    [
        ("exact_match", ["a", "b"], {}, "takes one text as the answer"),
        ("exact_match", 3, {}, "takes one text"),
        ("vqa_soft", ["a"] * 9, {}, "exactly ten answers, got 9"),
        ("option_letter", "B", {}, "needs the row's `choices`"),
        ("ocrbench", [3], SCENE, "takes texts as answers"),
        ("iou", [1, 2, 3, 4], {"width": 9}, "`height` must be"),
    ],
)
def test_published_modes_refuse_rows_that_their_scripts_cannot_score(
    name: str, reference: Any, extra: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build_metric(name, "published").check(reference, extra)


@pytest.mark.parametrize(
    ("name", "reference", "extra", "said"),
    [
        ("science", "x", {"text": "?"}, "`image` and `text`"),
        ("science", ["x"], TQA, "one text"),
        ("ocrbench", "x", {"answer_type": "Poems"}, "`answer_type` must be one of"),
        ("option_letter", 5, {"choices": ["a", "b"]}, "an option of its 2 options"),
        ("option_letter", "A", {"choices": 3}, "`choices` must be a list"),
        ("iou", [1, 2, 3, 4], {"width": "x", "height": 3}, "`width` must be"),
        ("coin_grounding", [1, 2, 3, 4], {}, "four fractions"),
    ],
)
def test_rows_that_no_mode_can_score(name: str, reference: Any, extra: dict[str, Any], said: str) -> None:
    for mode in ("fixed", "published"):
        with pytest.raises(ValueError, match=said):
            build_metric(name, mode).check(reference, extra)  # type: ignore[arg-type]


def test_the_published_multiple_choice_uses_the_first_rows_options_for_the_batch() -> None:
    rows = [("it is nine", 1, {"choices": ["three", "nine"]}), ("a cat", 0, {"choices": ["cat", "dog"]})]
    columns = [list(column) for column in zip(*rows, strict=True)]
    metric = build_metric("option_letter", "published")
    assert [metric.score(*row) for row in rows] == [1.0, 1.0]
    assert metric.scores(*columns) == [1.0, 0.0]
    assert build_metric("option_letter").scores(["B", "A"], *columns[1:]) == [1.0, 1.0]
    metric.update(*columns)
    assert metric.compute().item() == 50.0


def test_ocrbench_is_a_percentage_of_its_own_rows_except_as_published() -> None:
    rows = (["a", "b", "c", "d"], ["a", "b", "x", "x"], [SCENE, FORMULA, SCENE, SCENE])
    for mode, expected in (("fixed", 50.0), ("published", 0.2)):
        metric = build_metric("ocrbench", mode)  # type: ignore[arg-type]
        metric.update(*rows)
        assert metric.compute().item() == pytest.approx(expected)
        assert metric.compute().dtype == torch.float64


def test_groups() -> None:
    assert build_metric("ocrbench").group({"answer_type": "Handwriting Recognition"}) == "Text Recognition"
    assert build_metric("science").group(MAP) == "MapQA"
    assert build_metric("science").group(TQA) == "TQA"
    assert build_metric("cv_bench").group({"task": "Count"}) == "Count"
    assert build_metric("cv_bench").group({}) is None is build_metric("gqa").group({})


@pytest.mark.parametrize(
    ("text", "published", "fixed"),
    [
        ("Don't", "don't", "dont"),
        ("dont", "don't", "dont"),
        ("couldntve couldn'tve", "couldntve couldn't've", "couldntve couldntve"),
        ("The dog's", "dog 's", "dogs"),
        (".5 U.S. 3.5", ".5 us 3.5", "5 us 3.5"),
        ("half-full", "half full", "half full"),
        ("half-full - or", "halffull or", "half full or"),
        ("1,000", "1000", "1000"),
        ("Two\ttens", "2 tens", "2 tens"),
        ("." * 40, "." * 8, ""),
    ],
)
def test_the_published_form_of_vqa_answers(text: str, published: str, fixed: str) -> None:
    assert (m4c_clean(text), vqa_clean(text)) == (published, fixed)
