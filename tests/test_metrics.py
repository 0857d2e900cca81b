import pytest
import torch

from mcit_lightning.evaluation.metrics import METRICS, AnswerMetric, box_iou, get_metric, option_letter, parse_box
from mcit_lightning.evaluation.text import edit_distance, vqa_clean


def score(name, prediction, reference, **extra):
    return get_metric(name)().score(prediction, reference, extra)


def test_registry_names_the_nearest_metric():
    assert set(METRICS) >= {"exact_match", "contains", "option_letter", "vqa_soft", "anls", "iou"}
    with pytest.raises(ValueError, match=r"'exact_mach'.*Did you mean 'exact_match'"):
        get_metric("exact_mach")


@pytest.mark.parametrize("name", ["exact_match", "contains", "anls"])
def test_every_text_metric_scores_a_right_and_an_empty_answer(name):
    assert score(name, "Red Car", "red car") == 1.0
    assert score(name, "", "red car") == 0.0


def test_compute_is_the_percentage_over_all_rows():
    metric = get_metric("exact_match")()
    metric.update(["a", "b"], ["a", "x"], [{}, {}])
    metric.update(["c"], ["c"], [{}])
    assert metric.compute().item() == pytest.approx(200 / 3)
    assert metric.compute().dtype == torch.float64


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_rows_are_not_a_score_of_zero():
    assert torch.isnan(get_metric("exact_match")().compute())


def test_states_of_ranks_add_up_to_the_exact_mean():
    whole, first, second = (get_metric("exact_match")() for _ in range(3))
    rows = [("a", "a"), ("b", "x"), ("c", "c"), ("d", "d"), ("e", "x")]
    whole.update([p for p, _ in rows], [r for _, r in rows], [{}] * 5)
    for metric, part in ((first, rows[:2]), (second, rows[2:])):
        metric.update([p for p, _ in part], [r for _, r in part], [{}] * len(part))
    assert 100 * (first.total + second.total) / (first.count + second.count) == whole.compute()


def test_update_refuses_lists_of_different_lengths():
    with pytest.raises(ValueError, match="zip"):
        get_metric("exact_match")().update(["a"], [], [{}])


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        (" Yes. ", "yes", 1.0),
        ("STRASSE", "straße", 1.0),
        ("4", 4, 1.0),
        ("b", ["a", "B"], 1.0),
        ("3.5", "3.5", 1.0),
        ("yes sir", "yes", 0.0),
    ],
)
def test_exact_match(prediction, reference, expected):
    assert score("exact_match", prediction, reference) == expected


@pytest.mark.parametrize("reference", [None, [], {"a": 1}, [None]])
def test_unusable_references_are_refused_before_training(reference):
    with pytest.raises(ValueError, match="answer must be"):
        get_metric("exact_match")().check(reference, {})


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("It is a red car.", "red car", 1.0),
        ("I do not know", "no", 0.0),
        ("No, it is not", "no", 1.0),
        ("costs $3.50 (each)", "$3.50", 1.0),
        ("anything", "", 0.0),
        ("a dog", ["cat", "dog"], 1.0),
    ],
)
def test_contains_whole_words(prediction, reference, expected):
    assert score("contains", prediction, reference) == expected


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(b)", "B"),
        ("B. a red car", "B"),
        ("B) red", "B"),
        ("The answer is C.", "C"),
        ("Answer: d", "D"),
        ("I think it is (A)", "A"),
        ("A dog", ""),
        ("it is A.", "A"),
        ("it shows B because", "B"),
        ("", ""),
        ("none", ""),
    ],
)
def test_option_letter_in_free_text(text, letter):
    assert option_letter(text) == letter


def test_option_letter_metric():
    assert score("option_letter", "the answer is b", "B") == 1.0
    assert score("option_letter", "C", 2) == 1.0
    assert score("option_letter", "red", "B", choices=["green", "Red"]) == 1.0
    assert score("option_letter", "green", 1, choices=["green", "red"]) == 0.0
    assert score("option_letter", "red", 1, options={"A": "green", "B": "red"}) == 1.0
    assert score("option_letter", "", "A") == 0.0
    with pytest.raises(ValueError, match="name an option"):
        get_metric("option_letter")().check("a red car", {})


@pytest.mark.parametrize(("same", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_vqa_soft_leaves_one_out(same, expected):
    answers = ["two dogs"] * same + [f"other {n}" for n in range(10 - same)]
    assert score("vqa_soft", "2 dogs.", answers) == pytest.approx(expected)
    assert score("vqa_soft", "2 dogs.", [{"answer": a} for a in answers]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red, car!", "red car"),
        ("Don't", "dont"),
        ("1,000", "1000"),
        ("3.5 cm.", "3.5 cm"),
        ("none", "0"),
        ("half-full", "half full"),
    ],
)
def test_vqa_clean(text, expected):
    assert vqa_clean(text) == expected


@pytest.mark.parametrize("reference", ["yes", ["yes"], ["yes"] * 3])
def test_vqa_soft_refuses_too_few_answers(reference):
    with pytest.raises(ValueError, match=r"at least four.*exact_match"):
        get_metric("vqa_soft")().check(reference, {})


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [("", "", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2)],
)
def test_edit_distance(one, two, expected):
    assert edit_distance(one, two) == edit_distance(two, one) == expected


def test_anls():
    assert score("anls", "Coca Cola", "coca  cola") == 1.0
    assert score("anls", "kitten", ["dog", "sitting"]) == pytest.approx(1 - 3 / 7)
    assert score("anls", "abcd", "abxy") == 0.0  # exactly half is not more than half


def test_iou_of_both_box_forms():
    fractions, thousandths = "[0.10, 0.20, 0.50, 0.90]", "<box>[[100, 200, 500, 900]]</box>"
    for prediction in (fractions, thousandths):
        for reference in (fractions, thousandths, [0.1, 0.2, 0.5, 0.9]):
            assert score("iou", prediction, reference) == 1.0
    assert score("iou", thousandths, [64, 96, 320, 432], width=640, height=480) == 1.0
    assert score("iou", "[0.3, 0.2, 0.7, 0.9]", fractions) == 0.0  # a third
    assert score("iou", "no box", fractions) == score("iou", "", fractions) == 0.0
    with pytest.raises(ValueError, match="box of four numbers"):
        get_metric("iou")().check("[0.5, 0.1, 0.2, 0.9]", {})


def test_box_iou_by_hand():
    assert box_iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert box_iou((0, 0, 1, 1), (2, 2, 3, 3)) == 0.0
    assert parse_box("x1 -1.5 y1 2 x2 3 y2 4.25") == (-1.5, 2.0, 3.0, 4.25)
    assert parse_box("[.1,.2,.3,.4]") == (0.1, 0.2, 0.3, 0.4)
    assert parse_box("1 2 3") is None


def test_a_metric_without_score_is_abstract():
    with pytest.raises(NotImplementedError):
        AnswerMetric().update(["a"], ["a"], [{}])
