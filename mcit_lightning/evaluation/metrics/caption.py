"""Captions of pictures, scored over the whole split by COCO's measures. They need the extra `captions`."""

import json
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics.utilities.data import dim_zero_cat

from mcit_lightning.evaluation.captions import MEASURES, Tokenizer, caption_scores, check_installed
from mcit_lightning.evaluation.metrics.base import METRICS, AnswerMetric, Mode, references_of


class CaptionMetric(AnswerMetric):
    """Mean of some of COCO's caption measures over all captions, times 100.

    CIDEr weighs words by how rare they are in the whole split, and BLEU adds up counts, so neither is a mean of rows. The
    state is therefore the captions and their references themselves, as bytes; ranks gather them and each computes the same
    score, exact however the rows were split. In mode `fixed` it does not depend on their order either.

    `score` gives ROUGE-L of the row, with words as tokens, as a sign of quality while the split is not complete.
    `row_scores` gives the measures' own row scores afterwards.

    Published: pycocoevalcap as the benchmarks' scripts call it. Its defect: a carriage return or another end of line inside
    a caption shifts every caption after it to the wrong picture. (UCIT's script also takes the n-th line of the predictions
    for the n-th picture; `rescore` does so in this mode.)

    Args:
        mode: see `AnswerMetric`.
        tokenizer: `ptb`, COCO's own, which needs Java; `words` needs none but differs (`captions.words_tokens`), and is not
            for mode `published`.

    Raises:
        ValueError: pycocoevalcap or Java is missing.
    """

    published = "evaluate_caption.py (D-MoLE), pycocoevalcap"
    measures: ClassVar[tuple[str, ...]] = ()
    rows: list[Tensor]

    def __init__(self, *, mode: Mode = "fixed", tokenizer: Tokenizer = "ptb") -> None:
        super().__init__(mode=mode)
        check_installed(self.measures, tokenizer)
        if mode == "published" and tokenizer != "ptb":
            raise ValueError(f"published scores are with the tokenizer 'ptb', got {tokenizer!r}")
        self.tokenizer: Tokenizer = tokenizer
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self._evaluated: tuple[bytes, tuple[dict[str, float], dict[str, list[float]]]] | None = None

    def score(self, prediction: str, reference: Any, extra: dict[str, Any]) -> float:
        answers = _captions(reference)
        totals, _ = caption_scores([prediction], [answers], ("ROUGE_L",), tokenizer="words")
        return totals["ROUGE_L"]

    def check(self, reference: Any, extra: dict[str, Any]) -> None:
        """Refuse references that are no captions. Raises ValueError."""
        _captions(reference)

    def update(self, predictions: Sequence[str], references: Sequence[Any], extras: Sequence[dict[str, Any]]) -> None:
        """Keep the captions of a batch."""
        lines = [
            json.dumps([prediction, _captions(reference)])
            for prediction, reference, _ in zip(predictions, references, extras, strict=True)
        ]
        content = "".join(line + "\n" for line in lines).encode("ascii")
        self.rows.append(torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.device))

    def sync(self, *args: Any, **kwargs: Any) -> None:
        """As `Metric.sync`, for a rank without rows too: its empty share must have the others' data type."""
        if isinstance(self.rows, list) and not self.rows:
            self.rows = [torch.zeros(0, dtype=torch.uint8, device=self.device)]
        super().sync(*args, **kwargs)

    def compute(self) -> Tensor:
        """Mean of the measures times 100; NaN if no row was added."""
        values = list(self.details().values())
        return torch.tensor(sum(values) / len(values) if values else torch.nan, dtype=torch.float64)

    def details(self) -> dict[str, float]:
        """Each measure times 100."""
        totals, _ = self._evaluate()
        return {name: 100.0 * value for name, value in totals.items()}

    def row_scores(self) -> list[float] | None:
        """Mean of the measures of every row added here, 0 to 1 (CIDEr: 10), with the weights of all of them."""
        _, each = self._evaluate()
        return [sum(values) / len(values) for values in zip(*each.values(), strict=True)]

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        self._evaluated = None

    def _evaluate(self) -> tuple[dict[str, float], dict[str, list[float]]]:
        """Totals and row scores; kept until the rows change, because METEOR takes a while."""
        content = dim_zero_cat(self.rows).cpu().numpy().tobytes() if len(self.rows) else b""
        if self._evaluated is None or self._evaluated[0] != content:
            rows = [json.loads(line) for line in content.splitlines()]
            scores: tuple[dict[str, float], dict[str, list[float]]] = ({}, {})
            if rows:
                scores = caption_scores(
                    [prediction for prediction, _ in rows],
                    [captions for _, captions in rows],
                    self.measures,
                    tokenizer=self.tokenizer,
                    as_published=self.mode == "published",
                )
            self._evaluated = (content, scores)
        return self._evaluated[1]


def _captions(reference: Any) -> list[str]:
    captions = references_of(reference)
    if not all(isinstance(caption, str) and re.search(r"\w", caption) for caption in captions):
        raise ValueError(f"the answer must be a caption or a list of captions with a word each, got {reference!r}")
    return captions


@METRICS.register("bleu")
class Bleu(CaptionMetric):
    """BLEU-4 (Papineni et al., ACL 2002) over all captions, times 100. See `CaptionMetric`."""

    measures = ("Bleu_4",)


@METRICS.register("meteor")
class Meteor(CaptionMetric):
    """METEOR 1.5 (Denkowski & Lavie, 2014), times 100. Needs Java whatever the tokenizer. See `CaptionMetric`."""

    measures = ("METEOR",)


@METRICS.register("rouge_l")
class RougeL(CaptionMetric):
    """ROUGE-L as COCO computes it, times 100: the best precision and the best recall, be they of different references.

    See `CaptionMetric`.
    """

    measures = ("ROUGE_L",)


@METRICS.register("cider")
class Cider(CaptionMetric):
    """CIDEr-D (Vedantam et al., CVPR 2015), times 100, so that it may exceed 100. See `CaptionMetric`."""

    measures = ("CIDEr",)


@METRICS.register("caption_mean")
class CaptionMean(CaptionMetric):
    """Mean of BLEU-1 to 4, METEOR, ROUGE-L and CIDEr, each times 100: UCIT's number for VizWiz-caption and Flickr30k.

    It mixes measures of different ranges, so use it to compare with UCIT's tables only. See `CaptionMetric`.
    """

    published = "eval_caption.py (UCIT: VizWiz-caption, Flickr30k)"
    published_by_line = True
    measures = MEASURES
