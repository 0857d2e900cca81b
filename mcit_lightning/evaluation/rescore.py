"""`mcit-lightning score PREDICTIONS`: score predictions that a run, or another tool, has left behind."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mcit_lightning.data.references import References
    from mcit_lightning.evaluation.answers import Answer
    from mcit_lightning.evaluation.metrics import AnswerMetric, Mode


@dataclass(frozen=True)
class ScoredRow:
    """A prediction, the right answer and the score, between 0 and 1 (CIDEr: 10)."""

    id: str
    text: str
    reference: Any
    score: float


@dataclass(frozen=True)
class Rescored:
    """What `rescore` found.

    Args:
        score: the metric over all rows, in percent.
        rows: one per scored prediction.
        groups: category to mean score in percent and number of rows, for metrics with categories.
        details: further numbers of the metric, in percent.
        missing: questions of the references without a prediction.
        missing_counted: whether they count as wrong.
    """

    score: float
    rows: list[ScoredRow]
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)
    details: dict[str, float] = field(default_factory=dict)
    missing: int = 0
    missing_counted: bool = False


def rescore(
    predictions: Path,
    metric: str,
    *,
    references: Path | None = None,
    questions: Path | None = None,
    mode: "Mode" = "fixed",
    metric_args: dict[str, Any] | None = None,
    batch_size: int = 1,
) -> Rescored:
    """Score a file of predictions.

    Predictions find their answers by the question's id. In mode `fixed` an id may be predicted once only, and a question
    without a prediction is wrong. In mode `published` what the benchmark's script does is done: most leave such a question
    out, and some go by the order of the lines (`AnswerMetric.published_by_line`, `published_counts_missing`).

    Args:
        predictions: any form that `answers.read_answers` knows.
        metric: name of the metric.
        references: any form that `read_references` knows. Not needed where the predictions hold the answers.
        questions: the test file, where the references go by the number of the question's row (UCIT's captions) and the
            predictions by its id. Without it the n-th prediction is taken for the n-th row.
        mode: `fixed` or `published`.
        metric_args: further arguments of the metric.
        batch_size: rows that the metric gets at once, in the order of the file; it matters to D-MoLE's published multiple
            choice only.

    Raises:
        ValueError: a file is missing or malformed, a prediction has no answer, or the metric cannot score it.
    """
    from mcit_lightning.data.references import read_references
    from mcit_lightning.evaluation.answers import Answer, read_answers
    from mcit_lightning.evaluation.metrics import build_metric

    scorer = build_metric(metric, mode, metric_args)
    answers = read_answers(predictions)
    known = None if references is None else read_references(references, "references")
    lines = _question_lines(questions) if questions is not None else None
    matched, unused = _match(answers, known, lines, scorer, predictions)
    counted = bool(unused) and (mode == "fixed" or scorer.published_counts_missing)
    if known is not None and counted:
        for name in unused:
            reference, extra = known.entries[name]
            matched.append((Answer(name, "", -1), reference, extra))
    for answer, reference, extra in matched:
        try:
            scorer.check(reference, extra)
        except ValueError as error:
            raise ValueError(
                f"{predictions}, prediction of {_name(answer)}: cannot be scored by {metric}: {error}"
            ) from error
    scores = _score(scorer, matched, batch_size)
    groups: dict[str, list[float]] = {}
    for (_, _, extra), value in zip(matched, scores, strict=True):
        if (group := scorer.group(extra)) is not None:
            groups.setdefault(group, []).append(value)
    return Rescored(
        score=float(scorer.compute()),
        rows=[
            ScoredRow(_name(answer), answer.text, reference, value)
            for (answer, reference, _), value in zip(matched, scores, strict=True)
        ],
        groups={name: (100 * sum(values) / len(values), len(values)) for name, values in sorted(groups.items())},
        details=scorer.details(),
        missing=len(unused),
        missing_counted=counted,
    )


Matched = list[tuple["Answer", Any, dict[str, Any]]]


def _match(
    answers: "list[Answer]",
    known: "References | None",
    lines: dict[str, int] | None,
    metric: "AnswerMetric",
    source: Path,
) -> tuple[Matched, list[str]]:
    """The predictions with their answers, and the ids of the references that none has asked for."""
    if known is None:
        for answer in answers:
            if answer.reference is None and metric.needs_reference:
                raise ValueError(
                    f"{source}, prediction of {_name(answer)}: has no answer. Give the file of references."
                )
        return [(answer, answer.reference, answer.extra) for answer in answers], []
    names = _names(answers, known, lines, metric, source)
    used: set[str] = set()
    matched: Matched = []
    for answer, name in zip(answers, names, strict=True):
        if name not in known.entries:
            raise ValueError(f"{source}, prediction of {_name(answer)}: {known.source} has no answer to {name!r}.")
        if name in used and metric.mode == "fixed":
            raise ValueError(
                f"{source}: {name!r} is predicted twice. Keep one of the predictions, or use mode published."
            )
        used.add(name)
        reference, extra = known.entries[name]
        matched.append((answer, reference, {**answer.extra, **extra}))
    return matched, [name for name in known.entries if name not in used]


def _names(
    answers: "list[Answer]", known: "References", lines: dict[str, int] | None, metric: "AnswerMetric", source: Path
) -> list[str]:
    """The id under which the references hold the answer to each prediction."""
    by_line = metric.mode == "published" and metric.published_by_line
    if known.by_line:  # captions, by image
        by_line = by_line or lines is None
        if all(answer.by_image for answer in answers):
            return [str(answer.id) for answer in answers]
    elif all(answer.id is None for answer in answers):
        by_line = True
    if by_line:
        entries = list(known.entries)
        too_few = len(answers) < len(entries) and (known.by_line or metric.mode == "fixed")
        if len(answers) > len(entries) or too_few:
            raise ValueError(
                f"{source}: {len(answers)} predictions for the {len(entries)} answers of {known.source}, which can only be "
                "told apart by their order here. Give the test file as questions, or one prediction per answer."
            )
        return [str(number + 1) for number in range(len(answers))] if known.by_line else entries[: len(answers)]
    if not known.by_line:
        return [str(answer.id) for answer in answers]
    assert lines is not None
    for answer in answers:
        if answer.id not in lines:
            raise ValueError(f"{source}, prediction of {_name(answer)}: the file of questions has no such id.")
    return [str(lines[str(answer.id)] + 1) for answer in answers]


def _question_lines(path: Path) -> dict[str, int]:
    """Question id to 0-based number of its row."""
    from mcit_lightning.data.readers import file_format, read_file
    from mcit_lightning.data.records import Place, parse_parts

    lines: dict[str, int] = {}

    def visit(index: int, row: Any) -> None:
        place = Place(str(path), "questions", index)
        name = parse_parts(row, place, split="test", find_reference=lambda *_: (None, {})).id
        if lines.setdefault(name, index) != index:
            raise place.error("`question_id`", f"repeats {name!r}", "Number the questions anew.")

    kind = file_format(path.name, "auto", "questions")
    if kind == "hf":
        raise ValueError(f"questions: {path} is no JSON. Give the questions as JSON or JSON lines.")
    read_file(path, kind, "questions", visit)
    return lines


def _score(metric: "AnswerMetric", matched: Matched, batch_size: int) -> list[float]:
    scores: list[float] = []
    for start in range(0, len(matched), batch_size):
        batch = matched[start : start + batch_size]
        columns: tuple[Sequence[Any], ...] = tuple(zip(*batch, strict=True))
        texts = [answer.text for answer in columns[0]]
        scores += metric.scores(texts, columns[1], columns[2])
        metric.update(texts, columns[1], columns[2])
    exact = metric.row_scores()
    return scores if exact is None else exact


def _name(answer: "Answer") -> str:
    return f"line {answer.row + 1}" if answer.id is None else answer.id


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The predictions, how to score them, and what to write."""
    parser.add_argument("predictions", type=Path, metavar="PREDICTIONS", help="JSON lines or a JSON array")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--metric", metavar="NAME", help="name of the metric")
    how.add_argument(
        "--task", metavar="BENCHMARK/TASK", help="the metric of a task, for example ucit/flickr30k or my.yaml/flags"
    )
    how.add_argument(
        "--write", choices=("reasoning", "math", "gui"),
        help="score nothing, but write the file that a judge model or server takes: CoIN's reasoning score, MathVista, MMT-Bench",
    )  # fmt: skip
    parser.add_argument("--references", type=Path, metavar="FILE", help="the answers, if the predictions lack them")
    parser.add_argument(
        "--questions",
        type=Path,
        metavar="FILE",
        help="the test file, if the references go by its rows (UCIT's captions)",
    )
    parser.add_argument(
        "--mode", choices=("fixed", "published"), help="published: as the benchmark's script, defects included"
    )
    parser.add_argument(
        "--arg", action="append", default=[], metavar="KEY=VALUE", help="argument of the metric, e.g. tokenizer=words"
    )
    parser.add_argument("--batch-size", type=int, default=1, metavar="N", help="for D-MoLE's published multiple choice")
    parser.add_argument("--rows", type=Path, metavar="FILE", help="write the score of every row there, as JSON lines")
    parser.add_argument("--template", type=Path, metavar="FILE", help="with --write: the judge's rule or table to fill")
    parser.add_argument("--out", type=Path, metavar="FILE", help="with --write: where to")


def command(options: argparse.Namespace) -> int:
    """Score the predictions, or write the judge's file, and say what was done.

    Raises:
        ValueError: an option or a file is wrong.
        OSError: a file cannot be written.
    """
    from rich.console import Console

    from mcit_lightning.evaluation.files import write_atomic

    console = Console(highlight=False, soft_wrap=True)
    if options.write is not None:
        from mcit_lightning.evaluation.judge import write_for_judge

        console.print(
            write_for_judge(options.write, options.predictions, options.questions, options.template, options.out)
        )
        return 0
    if options.batch_size < 1:
        raise ValueError(f"--batch-size: is {options.batch_size}, must be at least 1")
    metric, mode, arguments = _chosen(options)
    found = rescore(
        options.predictions,
        metric,
        references=options.references,
        questions=options.questions,
        mode=mode,
        metric_args=arguments,
        batch_size=options.batch_size,
    )
    console.print(f"{metric} ({mode}): {found.score:.2f} over {len(found.rows)} rows")
    for name, value in found.details.items():
        console.print(f"  {name}: {value:.2f}")
    for name, (value, count) in found.groups.items():
        console.print(f"  {name}: {value:.2f} over {count} rows")
    if found.missing:
        how = "count as wrong" if found.missing_counted else "are left out, as in the published script"
        console.print(f"  {found.missing} questions have no prediction and {how}")
    if options.rows is not None:
        lines = [
            json.dumps({"question_id": row.id, "text": row.text, "answer": row.reference, "score": row.score})
            for row in found.rows
        ]
        write_atomic(options.rows, "\n".join([*lines, ""]))
    return 0


def _chosen(options: argparse.Namespace) -> "tuple[str, Mode, dict[str, Any]]":
    """Metric, mode and arguments of the command line."""
    import yaml

    arguments: dict[str, Any] = {}
    metric, mode = options.metric, options.mode
    if options.task is not None:
        from mcit_lightning.evaluation.task_lookup import find_task_config

        task = find_task_config(options.task)
        metric, arguments = task.metric, dict(task.metric_args)
        mode = mode or task.metric_mode
    for text in options.arg:
        key, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--arg: is {text!r}, must be key=value")
        arguments[key] = yaml.safe_load(value)
    return metric, mode or "fixed", arguments
