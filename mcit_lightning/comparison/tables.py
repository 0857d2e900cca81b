"""The numbers of a comparison as files: CSV for programs, Markdown and LaTeX for papers."""

import csv
import io
from collections.abc import Iterable, Sequence

from rich.table import Table
from rich.text import Text

from mcit_lightning.comparison.leaderboard import difference
from mcit_lightning.comparison.measures import COSTS, SCORES, Measure, best_of, shown_scores
from mcit_lightning.comparison.methods import Comparison, Group, Method
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.formatting import NONE, count_text, number_text

SHORT = ("MFN", "MFT", "BWT")
"""Measures for which a terminal has room."""
INTERVAL = "mean ± half the width of the 95 % t-interval over the seeds"
"""What stands in a cell of a table that people read."""
SPREAD = ("n", "mean", "sd", "ci95_low", "ci95_high")


def comparison_tables(comparison: Comparison) -> dict[str, str]:
    """File name -> content.

    * `leaderboard.csv`: a row per order, method and measure, with number of seeds, mean, standard deviation, interval;
    * `differences.csv`: the same of the paired differences to the reference;
    * `runs.csv`: a row per run with every measure;
    * `scores.csv`: a row per cell of every accuracy matrix;
    * `leaderboard.md`, `leaderboard.tex`: the scores, a table per order.
    """
    return {
        "leaderboard.csv": _text(("order", "method", "measure", *SPREAD), _means(comparison)),
        "differences.csv": _text(("order", "method", "reference", "measure", *SPREAD), _differences(comparison)),
        "runs.csv": _text(
            ("order", "method", "seed", *(m.key for m in (*SCORES, *COSTS)), "tasks", "folder"), _runs(comparison)
        ),
        "scores.csv": _text(("order", "method", "seed", "after", "task", "score"), _scores(comparison)),
        "leaderboard.md": markdown(comparison),
        "leaderboard.tex": latex(comparison),
    }


def _text(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()


def _spread(value: Estimate) -> tuple[object, ...]:
    parts = (
        value.mean,
        value.deviation,
        value.low if value.half is not None else None,
        value.high if value.half is not None else None,
    )
    return (len(value.values), *("" if part is None else f"{part:.6g}" for part in parts))


def _means(comparison: Comparison) -> Iterable[tuple[object, ...]]:
    for group, method, measure in _every(comparison):
        if (value := measure.of(method)) is not None:
            yield (group.number, method.name, measure.key, *_spread(value))


def _differences(comparison: Comparison) -> Iterable[tuple[object, ...]]:
    for group, method, measure in _every(comparison):
        base = next((other for other in group.methods if other.name == comparison.reference), None)
        if base is not None and base is not method and (value := difference(method, base, measure)) is not None:
            yield (group.number, method.name, base.name, measure.key, *_spread(value))


def _every(comparison: Comparison) -> Iterable[tuple[Group, Method, Measure]]:
    for group in comparison.groups:
        for method in group.ranked():
            for measure in (*SCORES, *COSTS):
                yield group, method, measure


def _runs(comparison: Comparison) -> Iterable[tuple[object, ...]]:
    for group in comparison.groups:
        for method in group.ranked():
            for run in method.runs:
                values = (measure.value(run) for measure in (*SCORES, *COSTS))
                shown = ("" if value is None else f"{value:.10g}" for value in values)
                yield (group.number, method.name, run.results.seed, *shown, " ".join(group.tasks), run.folder)


def _scores(comparison: Comparison) -> Iterable[tuple[object, ...]]:
    for group in comparison.groups:
        for method in group.ranked():
            for run in method.runs:
                results = run.results
                rows = [("zero_shot", results.zero_shot or [])] + [
                    (results.row_name(row), results.matrix.scores[row]) for row in results.matrix.filled_rows()
                ]
                for name, scores in rows:
                    for task, score in zip(group.tasks, scores, strict=False):
                        if score is not None:
                            yield (group.number, method.name, results.seed, name, task, f"{score:.4f}")


def _cells(group: Group, method: Method, measures: Sequence[Measure], bold: tuple[str, str]) -> list[str]:
    cells = []
    for measure in measures:
        value = measure.of(method)
        if value is None:
            cells.append(NONE)
            continue
        mean = number_text(value.mean, signed=measure.signed)
        if method.name in best_of(measure, group):
            mean = f"{bold[0]}{mean}{bold[1]}"
        cells.append(mean if value.half is None else f"{mean} ± {number_text(value.half)}")
    size = COSTS[0].of(method)
    return [*cells, NONE if size is None else count_text(size.mean)]


def markdown(comparison: Comparison) -> str:
    """A table per order, with a line that says what stands in it."""
    parts = []
    for group in comparison.groups:
        measures = shown_scores(group)
        head = ["method", "seeds", *(measure.heading for measure in measures), COSTS[0].heading]
        rows = [
            [
                f"{method.name} ({method.bound})" if method.bound else method.name,
                str(len(method.runs)),
                *_cells(group, method, measures, ("**", "**")),
            ]
            for method in group.ranked()
        ]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
        lines.insert(1, "|---|" + "---:|" * (len(head) - 1))
        parts.append(
            f"{group.order}; {INTERVAL}, in percent; bold: best, bounds not ranked.\n\n" + "\n".join(lines) + "\n"
        )
    return "\n".join(parts)


def latex(comparison: Comparison) -> str:
    """A `booktabs` table per order."""
    parts = ["% needs \\usepackage{booktabs}"]
    for group in comparison.groups:
        measures = shown_scores(group)
        head = ["Method", "Seeds", *(measure.heading for measure in measures), COSTS[0].heading]
        lines = [
            f"% {group.order}; {INTERVAL}",
            f"\\begin{{tabular}}{{lr{'r' * (len(head) - 2)}}}",
            "\\toprule",
            " & ".join(head) + " \\\\",
            "\\midrule",
        ]
        for method in group.ranked():
            name = _tex(f"{method.name} ({method.bound})" if method.bound else method.name)
            cells = [_number_tex(cell) for cell in _cells(group, method, measures, ("\\textbf{", "}"))]
            lines.append(" & ".join([name, str(len(method.runs)), *cells]) + " \\\\")
        parts.append("\n".join([*lines, "\\bottomrule", "\\end{tabular}"]))
    return "\n\n".join(parts) + "\n"


def _tex(text: str) -> str:
    """Text with LaTeX's own characters made plain."""
    special = {
        "\\": "\\textbackslash{}",
        "~": "\\textasciitilde{}",
        "^": "\\textasciicircum{}",
        **{c: f"\\{c}" for c in "&%$#_{}"},
    }
    return "".join(special.get(char, char) for char in text)


def _number_tex(cell: str) -> str:
    """A cell with LaTeX's minus and plus-minus signs."""
    return cell.replace("±", "$\\pm$").replace("\N{MINUS SIGN}", "$-$").replace(NONE, "--")


def terminal_tables(comparison: Comparison) -> list[Table]:
    """The scores for a terminal, a table per order."""
    tables = []
    for group in comparison.groups:
        measures = [measure for measure in shown_scores(group) if measure.key in SHORT]
        table = Table(title=f"{group.order} (mean ± 95 % interval)", title_justify="left", box=None, pad_edge=False)
        table.add_column("method", no_wrap=True)
        for heading in ("seeds", *(measure.heading for measure in measures), COSTS[0].heading.lower()):
            table.add_column(heading, justify="right", no_wrap=True)
        for method in group.ranked():
            table.add_row(Text(method.name), str(len(method.runs)), *_cells(group, method, measures, ("", "")))
        tables.append(table)
    return tables
