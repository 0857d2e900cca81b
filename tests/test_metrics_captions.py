"""Caption measures. Those with pycocoevalcap need the extra `captions`, and most of them Java."""

import importlib.util
import math
import os
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from mcit_lightning.config import TaskConfig
from mcit_lightning.evaluation import captions
from mcit_lightning.evaluation.captions import caption_scores, check_installed, ptb_tokens, words_tokens
from mcit_lightning.evaluation.metrics import build_metric, check_metric

PACKAGE = importlib.util.find_spec("pycocoevalcap") is not None
JAVA = shutil.which("java") is not None
needs_package = pytest.mark.skipif(not PACKAGE, reason="needs pycocoevalcap (pip install '.[captions]')")
needs_java = pytest.mark.skipif(not (PACKAGE and JAVA), reason="needs pycocoevalcap and Java")

PREDICTIONS = ["a man rides a horse", "two dogs play", "", "a red car on a road"]
REFERENCES = [
    ["A man rides a horse.", "Somebody is riding a brown horse."],
    ["Two dogs play in the snow."],
    ["A sign."],
    ["A blue car.", "A car parked on the road, near a house."],
]


def rows(count: int | None = None) -> tuple[list[str], list[Any], list[dict[str, Any]]]:
    return PREDICTIONS[:count], REFERENCES[:count], [{}] * len(PREDICTIONS[:count])


@pytest.mark.parametrize(
    ("missing", "metric", "arguments", "said"),
    [
        ("package", "cider", {"tokenizer": "words"}, r"pip install 'mcit-lightning\[captions\]'"),
        ("java", "cider", {}, r"install Java 8 or later, or set metric_args to {tokenizer: words}"),
        ("java", "meteor", {"tokenizer": "words"}, r"METEOR is a Java program"),
        ("nothing", "cider", {"tokenizer": "bpe"}, r"'ptb' or 'words', got 'bpe'"),
    ],
)
def test_what_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, missing: str, metric: str, arguments: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None if missing == "package" else object())
    monkeypatch.setattr(captions.shutil, "which", lambda name: None if missing == "java" else "/usr/bin/java")
    with pytest.raises(ValueError, match=said):
        build_metric(metric, arguments=arguments)
    check_metric(TaskConfig(metric=metric, metric_args=arguments))  # a configuration is valid all the same


def test_words_tokens() -> None:
    texts = ["A man's half-full 3.5 L (red) cup!", "Don't\nstop -- ever...", "Café 猫", ""]
    assert words_tokens(texts) == ["a man's half-full 3.5 l red cup", "don't stop ever", "café 猫", ""]


@needs_java
def test_ptb_tokens_and_the_published_shift() -> None:
    texts = ["A man's (red) half-full cup, don't!", "line\rend", "third", "fourth"]
    assert ptb_tokens(texts) == ["a man 's -lrb- red -rrb- half-full cup do n't", "line end", "third", "fourth"]
    assert ptb_tokens(texts, as_published=True)[1:] == ["line", "end", "third"]
    assert ptb_tokens(["", "\n", "Café 猫", ""]) == ["", "", "café 猫", ""]
    assert ptb_tokens([]) == []


@needs_package
def test_rouge_l_by_hand() -> None:
    # the longest common subsequence of "two dogs play" and "two dogs play in the snow" is 3 of 3 and 3 of 6 words
    precision, recall, beta = 1.0, 0.5, 1.2
    expected = (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    totals, each = caption_scores(*rows()[:2], ["ROUGE_L"], tokenizer="words")
    assert each["ROUGE_L"][1] == pytest.approx(expected)
    assert totals["ROUGE_L"] == pytest.approx(sum(each["ROUGE_L"]) / 4)
    assert build_metric("rouge_l", arguments={"tokenizer": "words"}).score(
        "two dogs play", "Two dogs play in the snow.", {}
    ) == pytest.approx(expected)


@needs_package
def test_bleu_adds_up_counts_by_hand() -> None:
    totals, _ = caption_scores(["a b c", "a d"], [["a b d"], ["a d e f"]], ["Bleu_1", "Bleu_2"], tokenizer="words")
    brevity = math.exp(1 - 7 / 5)  # 5 words for 7
    assert totals["Bleu_1"] == pytest.approx(brevity * 4 / 5, rel=1e-6)
    assert totals["Bleu_2"] == pytest.approx(brevity * math.sqrt(4 / 5 * 2 / 3), rel=1e-6)


@needs_package
def test_cider_by_hand() -> None:
    # Unigrams only matter for one-word captions; every word is in one of three images, so idf is log 3 and the cosine 1 or 0.
    totals, each = caption_scores(["cat", "dog", "x"], [["cat"], ["dog"], ["sun"]], ["CIDEr"], tokenizer="words")
    assert each["CIDEr"] == pytest.approx([10 / 4, 10 / 4, 0.0])
    assert totals["CIDEr"] == pytest.approx(5 / 3)


@needs_package
def test_scores_do_not_depend_on_the_order_or_the_batches() -> None:
    arguments = {"tokenizer": "words"}
    one, other = build_metric("cider", arguments=arguments), build_metric("cider", arguments=arguments)
    one.update(*rows())
    for number in (3, 1, 0, 2):
        other.update([PREDICTIONS[number]], [REFERENCES[number]], [{}])
    assert one.compute() == other.compute() > 0
    first, second = one.row_scores(), other.row_scores()
    assert first is not None and second is not None
    assert [first[number] for number in (3, 1, 0, 2)] == pytest.approx(second, rel=1e-12)
    assert sum(first) / 4 * 100 == pytest.approx(one.compute().item())
    one.update(*rows(1))
    assert len(one.row_scores() or []) == 5
    one.reset()
    one.update(*rows(2))
    assert len(one.row_scores() or []) == 2


@needs_package
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_no_captions_are_not_a_score_and_no_words_are_refused() -> None:
    metric = build_metric("bleu", arguments={"tokenizer": "words"})
    assert torch.isnan(metric.compute())
    for reference in ([], ["..."], None, ["a", 3.5, {}], [""]):
        with pytest.raises(ValueError, match="answer must be"):
            metric.check(reference, {})
    metric.check("a caption", {})


@needs_package
def test_published_scores_are_with_cocos_tokenizer() -> None:
    with pytest.raises(ValueError, match="'ptb', got 'words'"):
        build_metric("cider", "published", {"tokenizer": "words"})


@needs_java
def test_a_carriage_return_shifts_captions_as_published_only() -> None:
    predictions = ["a man\rrides", "two dogs", "a sign"]
    references = [["a man rides"], ["two dogs"], ["a sign"]]
    scores = {}
    for mode in ("fixed", "published"):
        metric = build_metric("rouge_l", mode)  # type: ignore[arg-type]
        metric.update(predictions, references, [{}] * 3)
        scores[mode] = metric.row_scores()
    assert scores["fixed"] == [1.0, 1.0, 1.0]
    assert scores["published"][0] < 1.0 and scores["published"][1:] == [0.0, 0.0]


@needs_java
@pytest.mark.slow
def test_caption_mean_is_the_package_own_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    right = tokenizer.tokenize({n: [{"caption": text} for text in texts] for n, texts in enumerate(REFERENCES)})
    given = tokenizer.tokenize({n: [{"caption": text}] for n, text in enumerate(PREDICTIONS)})
    bleu, _ = Bleu(4).compute_score(right, given)
    others = [scorer.compute_score(right, given)[0] for scorer in (Meteor(), Rouge(), Cider())]
    capsys.readouterr()
    for mode in ("fixed", "published"):
        metric = build_metric("caption_mean", mode)  # type: ignore[arg-type]
        metric.update(*rows())
        assert list(metric.details().values()) == pytest.approx([100 * value for value in [*bleu, *others]])
        assert metric.compute().item() == pytest.approx(100 * sum([*bleu, *others]) / 7)
    assert capsys.readouterr().out == ""


def gathered(rank: int, folder: Path) -> None:
    """One of three processes, of which the last has no rows."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    metric = build_metric("cider", arguments={"tokenizer": "words"})
    for number in ((0, 2, 3), (1,), ())[rank]:
        metric.update([PREDICTIONS[number]], [REFERENCES[number]], [{}])
    torch.save((metric.compute(), len(metric.row_scores() or [])), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@needs_package
@pytest.mark.slow
def test_ranks_gather_the_captions_and_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in paths if path))
    torch.multiprocessing.spawn(gathered, args=(tmp_path,), nprocs=3)
    whole = build_metric("cider", arguments={"tokenizer": "words"})
    whole.update(*rows())
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(3)]
    assert [value for value, _ in found] == [whole.compute()] * 3
    assert Counter(count for _, count in found) == {3: 1, 1: 1, 0: 1}


@needs_package
def test_check_installed_accepts_what_is_there() -> None:
    check_installed(["CIDEr"], "words")
