"""The measures of COCO's caption evaluation (Chen et al., "Microsoft COCO Captions", 2015), by the package pycocoevalcap."""

import importlib
import importlib.util
import math
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

MEASURES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")
"""Every measure but SPICE, under COCO's names. All lie between 0 and 1, CIDEr between 0 and 10."""

Tokenizer = Literal["ptb", "words"]

_SCORERS = {
    "METEOR": ("meteor.meteor", "Meteor"),
    "ROUGE_L": ("rouge.rouge", "Rouge"),
    "CIDEr": ("cider.cider", "Cider"),
}
_JAR = "stanford-corenlp-3.4.1.jar"
_TOKENIZER_CLASS = "edu.stanford.nlp.process.PTBTokenizer"
_MARKS = frozenset({"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"})
"""Tokens that COCO's evaluation leaves out. (It means to leave out brackets too, but not as they look in lower case.)"""
# What the tokenizer takes for the end of a line, and the separator of METEOR's input.
_BREAKS = re.compile(r"[\s\x1c-\x1f\x85\u2028\u2029]+|\|\|\|")


def check_installed(measures: Sequence[str], tokenizer: str) -> None:
    """Refuse a measure or tokenizer that cannot work here, before anything is computed.

    Raises:
        ValueError: pycocoevalcap, or Java where it is needed, is missing, or there is no such tokenizer.
    """
    if tokenizer not in ("ptb", "words"):
        raise ValueError(f"the tokenizer of captions is 'ptb' or 'words', got {tokenizer!r}")
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError(
            "captions are scored by pycocoevalcap, which is missing: pip install 'mcit-lightning[captions]'"
        )
    if shutil.which("java") is None and "METEOR" in measures:
        raise ValueError(
            "METEOR is a Java program and there is no `java`: install Java 8 or later, or use another metric"
        )
    if shutil.which("java") is None and tokenizer == "ptb":
        raise ValueError(
            "COCO's tokenizer is a Java program and there is no `java`: install Java 8 or later, or set metric_args to "
            "{tokenizer: words}, whose scores differ a little from published ones"
        )


def caption_scores(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    measures: Sequence[str],
    *,
    tokenizer: Tokenizer = "ptb",
    as_published: bool = False,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Score captions as COCO's evaluation does, over all of them and each by itself.

    Args:
        predictions: one caption per image.
        references: the right captions of each image, at least one.
        measures: names out of `MEASURES`.
        tokenizer: `ptb` is COCO's, `words` needs no Java (see `words_tokens`).
        as_published: hand the texts to the tokenizer as they are. Other ends of lines than a line feed, for example a
            carriage return, then shift every later caption by one, as in the published code.

    Returns:
        Measure to score, and measure to the scores of the images. BLEU's total is no mean: it adds up the counts.

    Raises:
        ValueError: Java fails.
    """
    tokenize = words_tokens if tokenizer == "words" else ptb_tokens
    given = tokenize(predictions, as_published)
    flat = tokenize([caption for captions in references for caption in captions], as_published)
    right, start = [], 0
    for captions in references:
        right.append(flat[start : start + len(captions)])
        start += len(captions)
    totals: dict[str, float] = {}
    rows: dict[str, list[float]] = {}
    if any(name.startswith("Bleu") for name in measures):
        scorer = _package("bleu.bleu_scorer").BleuScorer(n=4)
        for caption, captions in zip(given, right, strict=True):
            scorer += (caption, captions)
        total, each = scorer.compute_score(option="closest", verbose=0)
        for number in range(4):
            totals[f"Bleu_{number + 1}"], rows[f"Bleu_{number + 1}"] = (
                float(total[number]),
                list(map(float, each[number])),
            )
    right_by_row = dict(enumerate(right))
    given_by_row = {number: [caption] for number, caption in enumerate(given)}
    for name, (module, scorer_class) in _SCORERS.items():
        if name in measures:
            scorer = getattr(_package(module), scorer_class)()
            try:
                total, each = scorer.compute_score(right_by_row, given_by_row)
            except (ValueError, OSError) as error:
                raise ValueError(f"{name}'s program failed: {error}. Check that `java -version` answers.") from error
            rows[name] = list(map(float, each))
            # METEOR's total is from added counts; sums in any order are exact.
            totals[name] = float(total) if name == "METEOR" else math.fsum(rows[name]) / len(rows[name])
    return {name: totals[name] for name in measures}, {name: rows[name] for name in measures}


def words_tokens(captions: Sequence[str], as_published: bool = False) -> list[str]:
    """Captions in lower case, as words separated by blanks, without Java.

    Where it differs from COCO's tokenizer: "don't" and "man's" stay one word (COCO: "do n't", "man 's"); brackets, quotes
    and every other mark are dropped, except inside a number or between letters ("half-full", "3.5", "u.s"); so BLEU and CIDEr
    of captions with such words differ a little.
    """
    del as_published
    found = (re.findall(r"\w+(?:[-'’./]\w+)*", caption.lower()) for caption in captions)
    return [" ".join(words) for words in found]


def ptb_tokens(captions: Sequence[str], as_published: bool = False) -> list[str]:
    """Captions as COCO's evaluation tokenizes them: Penn Treebank tokens in lower case without punctuation.

    Runs the Java program that comes with pycocoevalcap once for all captions.

    Args:
        captions: the texts.
        as_published: see `caption_scores`.

    Raises:
        ValueError: Java fails, or has not given one line per caption.
    """
    if not captions:
        return []
    texts = [text.replace("\n", " ") if as_published else _BREAKS.sub(" ", text) for text in captions]
    jar = Path(importlib.import_module("pycocoevalcap").__path__[0], "tokenizer", _JAR)
    command = ["java", "-cp", str(jar), _TOKENIZER_CLASS, "-preserveLines", "-lowerCase", "-encoding", "utf-8"]
    done = subprocess.run(command, input="\n".join([*texts, ""]).encode("utf-8"), capture_output=True, check=False)
    lines = done.stdout.decode("utf-8").split("\n")[:-1]
    if done.returncode or len(lines) < len(texts) or (len(lines) > len(texts) and not as_published):
        raise ValueError(
            f"COCO's tokenizer failed (status {done.returncode}, {len(lines)} lines for {len(texts)} captions): "
            f"{done.stderr.decode('utf-8', 'replace')[-300:]}"
        )
    return [" ".join(word for word in line.split() if word not in _MARKS) for line in lines[: len(texts)]]


def _package(module: str) -> Any:
    return importlib.import_module(f"pycocoevalcap.{module}")
