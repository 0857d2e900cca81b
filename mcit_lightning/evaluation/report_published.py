"""The report's part on published numbers: the run's row beside those of its benchmark, and what keeps them from comparing."""

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from mcit_lightning.evaluation.formatting import NONE, number_text
from mcit_lightning.evaluation.page import line_table, section
from mcit_lightning.evaluation.published import Protocol, PublishedRow, published_for
from mcit_lightning.evaluation.results import Results
from mcit_lightning.evaluation.task_lookup import find_task_config
from mcit_lightning.evaluation.transfer import TransferMatrix
from mcit_lightning.loading import experiments_dir

AGGREGATES = {
    "MFT": "MFT",
    "MFN": "MFN",
    "MAA": "MAA",
    "AVG": "AVG",
    "BWT": "BWT",
    "BWT_T": "BWT (divided by T)",
    "backward": "BWT (mean over stages)",
}
"""Key in published.yaml -> heading, in the order of the columns."""
SIGNED = ("BWT", "BWT_T", "backward")
MARKS = {"paper": "", "secondary": " (s)", "rerun": " (r)"}


def published_section(results: Results, config_yaml: str = "") -> str:
    """A table per protocol that was published for exactly the run's tasks in their order; empty if none was.

    Columns without any published number are left out. Backward transfer is given as the table's authors define it.

    Args:
        results: of the run; of an unfinished one the scores so far are shown, but no aggregate.
        config_yaml: its resolved configuration, which says how the answers were scored; may be empty.
    """
    rows = published_for(results.tasks)
    if not rows:
        return ""
    protocols = list({row.protocol.name: row.protocol for row in rows}.values())
    tables = []
    for protocol in protocols:
        own = [row for row in rows if row.protocol.name == protocol.name]
        tables.append(
            f"<h3>{escape(protocol.name)}: {escape(protocol.backbone)}</h3>"
            f'<p class="soft">{escape(protocol.convention)}</p>'
            + _notes(_backbone_note(results, protocol))
            + _table(results, own)
        )
    warnings = _warnings(results, protocols[0].benchmark, config_yaml)
    if len(protocols) > 1:
        warnings.insert(0, "The tables below do not compare with each other: rows compare within one table only.")
    return section(
        "Published numbers",
        "What papers print for these tasks in this order; after the last task where nothing else is said. No mark: read in the "
        "paper. (s): quoted by others. (r): somebody&#x27;s own run of the published code. A run compares with a table only with "
        "the table&#x27;s backbone and batch, all rows, and the benchmark&#x27;s own scorers.",
        _notes(warnings),
        *tables,
    )


def backward_over_stages(matrix: TransferMatrix) -> float | None:
    """D-MoLE's backward transfer: mean over i < T of the mean over t > i of A[t][i] - A[i][i]; None if a score is missing."""
    scores, count = matrix.scores, len(matrix)
    means = []
    for task in range(count - 1):
        learnt = scores[task][task]
        later = [score for stage in range(task + 1, count) if (score := scores[stage][task]) is not None]
        if learnt is None or len(later) < count - 1 - task:
            return None
        means.append(sum(later) / len(later) - learnt)
    return sum(means) / len(means) if means else None


def _table(results: Results, rows: Sequence[PublishedRow]) -> str:
    per_task = any(_scores(row)[1] for row in rows)
    keys = [key for key in AGGREGATES if any(key in row.aggregates for row in rows)]
    columns = ["Method", *(results.tasks if per_task else []), *(AGGREGATES[key] for key in keys), "Source"]

    def line(
        name: str,
        scores: Sequence[float | None],
        values: Mapping[str, float | None],
        source: str,
        form: Callable[[str], str],
    ) -> tuple[str, list[str]]:
        shown = [number_text(score, digits=2) for score in scores or [None] * len(results.tasks)] if per_task else []
        shown += [number_text(values.get(key), signed=key in SIGNED, digits=2) for key in keys]
        return name, [*map(form, shown), escape(source)]

    lines = []
    if any(row.zero_shot for row in rows) and results.zero_shot is not None:
        lines.append(line("This run, zero-shot", results.zero_shot, {}, "", _strong))
    last = results.matrix.last_row()
    if last is not None:
        finished = last + 1 == len(results.tasks)
        name = "This run" if finished else f"This run, after {last + 1} of {len(results.tasks)} tasks"
        values = {**results.summary, "backward": backward_over_stages(results.matrix)} if finished else {}
        lines.append(line(name, results.matrix.scores[last], values, "", _strong))
    for row in rows:
        kind, scores = _scores(row)
        name = row.method + MARKS[row.evidence] + ("" if row.method == kind else f", {kind}" if kind else "")
        lines.append(line(name, scores, row.aggregates, row.source, str))
    return line_table([escape(name) for name in columns], lines)


def _scores(row: PublishedRow) -> tuple[str, tuple[float, ...]]:
    """The per-task scores of a row, and what they are unless they are those after the last task."""
    if row.last:
        return "", row.last
    if row.just_learnt:
        return "just learnt", row.just_learnt
    return "zero-shot" if row.zero_shot else "", row.zero_shot


def _strong(text: str) -> str:
    return text if text == NONE else f"<strong>{text}</strong>"


def _notes(texts: Sequence[str]) -> str:
    return "".join(f'<p class="note">{escape(text)}</p>' for text in texts)


def _backbone_note(results: Results, protocol: Protocol) -> list[str]:
    """Whether the run's backbone has another name than the one that the rows start from."""
    asked = re.sub(r"[^a-z0-9]", "", protocol.backbone.partition(" ")[0].lower())
    if asked in re.sub(r"[^a-z0-9]", "", results.backbone.lower()):
        return []
    return [f"These rows start from {protocol.backbone}, this run from {results.backbone}: they do not compare."]


def _annotations(benchmark: str) -> str | None:
    """The folder of the instructions that a benchmark's published rows are about; None if it has one set of them only."""
    preset = yaml.safe_load((experiments_dir() / f"_base/{benchmark}.yaml").read_text(encoding="utf-8"))
    found: str | None = preset["data"].get("annotations")
    return found


def _warnings(results: Results, benchmark: str, config_yaml: str) -> list[str]:
    """What of the run's configuration keeps it from comparing with any of the tables."""
    try:
        settings = yaml.safe_load(config_yaml)
    except yaml.YAMLError:
        settings = None
    if not isinstance(settings, dict):
        return ["The run's configuration is not known, and so not whether it was scored as the published rows were."]
    warnings = []
    tasks: dict[str, Any] = settings.get("tasks") or {}
    fixed = [task for task in results.tasks if (tasks.get(task) or {}).get("metric_mode", "fixed") != "published"]
    if fixed:
        warnings.append(
            f"Scored with corrected scorers (metric_mode: fixed): {', '.join(fixed)}. The published rows come from the "
            "benchmark's own scripts, defects included. metric_mode: published scores as they do, and mcit-lightning score "
            "does it afterwards."
        )
    own = {task: find_task_config(f"{benchmark}/{task}").metric for task in results.tasks}
    other = [
        f"{task} by {results.metrics[task]}, not {own[task]}"
        for task in results.tasks
        if results.metrics[task] != own[task]
    ]
    if other:
        warnings.append(f"Scored by another metric than the benchmark's: {'; '.join(other)}.")
    data: dict[str, Any] = settings.get("data") or {}
    used, published = data.get("annotations"), _annotations(benchmark)
    if published is not None and used is not None and used != published:
        warnings.append(
            f"Other instructions (data.annotations: {used}) than those of the published rows ({published})."
        )
    if data.get("limit_test") is not None:
        warnings.append(f"Evaluated on at most {data['limit_test']} test rows per task (data.limit_test).")
    if data.get("limit_train") is not None or data.get("fraction", 1.0) != 1.0:
        warnings.append("Trained on a part of the training rows (data.limit_train, data.fraction).")
    return warnings
