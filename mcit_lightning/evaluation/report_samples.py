"""The report's cards with test questions, before and after later tasks."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from mcit_lightning.evaluation.page import section, shortened
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.samples import RIGHT, ImageOf, Sample, choose_samples, thumbnail


def samples_section(root: Path, results: Results, image_of: ImageOf | None) -> str:
    """A few questions per task with their pictures and answers; empty before the first evaluation."""
    parts = []
    for task in results.tasks:
        if chosen := choose_samples(root, results, task):
            cards = "".join(_card(task, sample, image_of) for sample in chosen)
            parts.append(f'<h3>{escape(task)}</h3><div class="cards">{cards}</div>')
    if not parts:
        return ""
    return section(
        "Sample answers",
        "The same questions right after the task was learnt and after the last stage; forgotten ones come first.",
        *parts,
    )


def _card(task: str, sample: Sample, image_of: ImageOf | None) -> str:
    rows = [("Expected", escape(expected_text(sample.final)))]
    if sample.learnt is sample.final:
        rows.append(("Answered", answer_html(sample.final)))
    else:
        rows += [("Just learnt", answer_html(sample.learnt)), ("At the end", answer_html(sample.final))]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return card(task, sample.final, f"<dl>{items}</dl>", image_of)


def card(task: str, row: Mapping[str, Any], content: str, image_of: ImageOf | None, below: str = "") -> str:
    """A question with its picture.

    Args:
        task: of the question.
        row: a prediction for it.
        content: what stands below the question (HTML).
        image_of: finds the picture.
        below: what stands below the picture, over the card's whole width (HTML).
    """
    path = image_of(task, int(row["index"])) if image_of is not None else None
    picture = thumbnail(path) if path is not None else None
    image = f'<img src="{picture}" alt="" loading="lazy">' if picture else ""
    return (
        f'<article class="card{"" if image else " bare"}">{image}<div class="body">'
        f'<p class="question">{escape(shortened(str(row["prompt"]), 280))}</p>{content}</div>{below}</article>'
    )


def expected_text(row: Mapping[str, Any]) -> str:
    """The reference answer of a prediction; different ones with commas between them."""
    reference = row["answer"]
    if isinstance(reference, list):
        return ", ".join(dict.fromkeys(str(item) for item in reference))
    return str(reference)


def answer_html(row: Mapping[str, Any]) -> str:
    """The answer of a prediction with a mark that says whether it is right."""
    right = float(str(row["score"])) >= RIGHT
    mark, word, kind = ("\N{CHECK MARK}", "right", "up") if right else ("\N{MULTIPLICATION X}", "wrong", "down")
    text = shortened(str(row["text"]).strip(), 160) or "(empty)"
    return f'{escape(text)} <span class="mark {kind}" role="img" aria-label="{word}">{mark}</span>'
