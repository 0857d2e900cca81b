"""The report's cards with test questions, before and after later tasks."""

from html import escape
from pathlib import Path

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
    path = image_of(task, int(sample.final["index"])) if image_of is not None else None
    picture = thumbnail(path) if path is not None else None
    image = f'<img src="{picture}" alt="" loading="lazy">' if picture else ""
    reference = sample.final["answer"]
    expected = (
        ", ".join(dict.fromkeys(str(item) for item in reference)) if isinstance(reference, list) else str(reference)
    )
    rows = [("Expected", escape(expected))]
    if sample.learnt is sample.final:
        rows.append(("Answered", _answer(sample.final)))
    else:
        rows += [("Just learnt", _answer(sample.learnt)), ("At the end", _answer(sample.final))]
    items = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
    return (
        f'<article class="card{"" if image else " bare"}">{image}<div class="body">'
        f'<p class="question">{escape(shortened(str(sample.final["prompt"]), 280))}</p><dl>{items}</dl></div></article>'
    )


def _answer(row: dict[str, object]) -> str:
    right = float(str(row["score"])) >= RIGHT
    mark, word, kind = ("\N{CHECK MARK}", "right", "up") if right else ("\N{MULTIPLICATION X}", "wrong", "down")
    text = shortened(str(row["text"]).strip(), 160) or "(empty)"
    return f'{escape(text)} <span class="mark {kind}" role="img" aria-label="{word}">{mark}</span>'
