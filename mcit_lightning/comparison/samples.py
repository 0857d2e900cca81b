"""The page's cards with test questions, and what every method answered just after the task and at the end."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from mcit_lightning.comparison.find import Run
from mcit_lightning.comparison.methods import Group, Method, method_html
from mcit_lightning.evaluation.formatting import NONE
from mcit_lightning.evaluation.page import section
from mcit_lightning.evaluation.predictions import read_predictions
from mcit_lightning.evaluation.report_samples import answer_html, card, expected_text
from mcit_lightning.evaluation.samples import RIGHT, ImageOf

PicturesOf = Callable[[Run], ImageOf | None]
"""From a run to what finds its test pictures."""
WANTED = (("apart", 2), ("right", 1), ("wrong", 1))
"""Kinds of questions and how many of each: methods differ at the end, all are right, all are wrong."""


@dataclass(frozen=True)
class Answers:
    """A method's answers to a question.

    Args:
        learnt: the prediction right after the task's own stage; None if that was not evaluated.
        final: after the last stage; None likewise.
    """

    learnt: dict[str, Any] | None
    final: dict[str, Any] | None

    @property
    def known(self) -> dict[str, Any]:
        """The later one that is there."""
        found = self.final or self.learnt
        assert found is not None
        return found

    @property
    def right(self) -> bool:
        """Whether the later one is right."""
        return float(self.known["score"]) >= RIGHT

    @property
    def lost(self) -> bool:
        """Whether it was right and no longer is."""
        return self.learnt is not None and float(self.learnt["score"]) >= RIGHT and not self.right


def samples_section(group: Group, pictures: PicturesOf) -> str:
    """Up to four questions per task, all of the same seed where there is one that all methods have."""
    methods = [method for method in group.ranked() if method.strategy != "zero_shot"]
    common = set.intersection(*(set(method.seeds) for method in methods)) if methods else set()
    seed = min(common, default=None)
    runs = [(method, next(run for run in method.runs if seed in (None, run.results.seed))) for method in methods]
    parts = []
    for task in group.tasks:
        answers = {method.name: _answers(run, task) for method, run in runs}
        answers = {name: own for name, own in answers.items() if own}
        if not answers:
            continue
        image_of = pictures(next(run for method, run in runs if method.name in answers))
        shown = [method for method, _ in runs if method.name in answers]
        cards = [
            card(task, row := _row(answers, index), _expected(row), image_of, _table(shown, answers, index))
            for index in choose(list(answers.values()))
        ]
        if cards:
            parts.append(f'<h3>{escape(task)}</h3><div class="cards">{"".join(cards)}</div>')
    if not parts:
        return ""
    which = (
        f"Runs with seed {seed}." if seed is not None else "The first seed of each method, as none is common to all."
    )
    return section(
        "Sample answers",
        "The same questions for every method, right after the task was learnt and after the last stage: two on which the methods "
        f"end apart, one that all know, one that none does. {which}",
        *parts,
    )


def choose(answers: Sequence[dict[int, Answers]]) -> list[int]:
    """Numbers of the questions to show, out of those that every method answered.

    Among those on which the methods end apart, the ones that most methods knew and lost come first.
    """
    common = sorted(set.intersection(*(set(own) for own in answers)))
    kinds: dict[str, list[int]] = {kind: [] for kind, _ in WANTED}
    for index in common:
        right = sum(own[index].right for own in answers)
        kinds["right" if right == len(answers) else "wrong" if right == 0 else "apart"].append(index)
    kinds["apart"].sort(key=lambda index: -sum(own[index].lost for own in answers))
    kinds["wrong"].sort(key=lambda index: -sum(own[index].lost for own in answers))
    return [index for kind, wanted in WANTED for index in kinds[kind][:wanted]]


def _answers(run: Run, task: str) -> dict[int, Answers]:
    """Question -> the run's answers.

    Raises:
        ValueError: the predictions are damaged.
    """
    results = run.results
    last, own = results.matrix.last_row(), results.tasks.index(task)
    try:
        learnt = read_predictions(run.folder, results.folder_of(own), task)
        final = read_predictions(run.folder, None if last is None else results.folder_of(last), task)
        for row in (*learnt.values(), *final.values()):
            _ = float(row["score"]), row["prompt"], row["text"], row["answer"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{run.folder}: its predictions of {task} are not as a run writes them ({type(error).__name__}: {error}). "
            "Restore them from a copy, or remove the run's predictions folder to compare it without sample answers"
        ) from error
    return {index: Answers(learnt.get(index), final.get(index)) for index in learnt.keys() | final.keys()}


def _row(answers: dict[str, dict[int, Answers]], index: int) -> dict[str, Any]:
    return next(iter(answers.values()))[index].known


def _expected(row: dict[str, Any]) -> str:
    return f"<dl><dt>Expected</dt><dd>{escape(expected_text(row))}</dd></dl>"


def _table(methods: Sequence[Method], answers: dict[str, dict[int, Answers]], index: int) -> str:
    """A row per method."""
    rows = []
    for method in methods:
        own = answers[method.name][index]
        cells = "".join(f"<td>{NONE if row is None else answer_html(row)}</td>" for row in (own.learnt, own.final))
        rows.append(f'<tr><th scope="row">{method_html(method)}</th>{cells}</tr>')
    return (
        '<table class="answers"><thead><tr><th></th><th scope="col">Just learnt</th><th scope="col">At the end</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )
