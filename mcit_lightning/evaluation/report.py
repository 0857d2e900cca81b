"""One self-contained page about a run: no network, no script, light and dark, readable on a phone."""

from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from mcit_lightning.evaluation.colours import TASK_DARK, TASK_LIGHT, css, ink, score_colour
from mcit_lightning.evaluation.files import write_atomic
from mcit_lightning.evaluation.formatting import NONE, bytes_text, count_text, number_text, seconds_text
from mcit_lightning.evaluation.results import CostRow, Results
from mcit_lightning.evaluation.samples import RIGHT, ImageOf, Sample, choose_samples, thumbnail
from mcit_lightning.evaluation.svg import Line, line_chart

REPORT_FILE = "report.html"

TILES = {
    "MFN": ("Final (MFN)", "Mean score of the learnt tasks after the last stage.", False),
    "MFT": ("Just learnt (MFT)", "Mean score of every task right after it was learnt: plasticity.", False),
    "BWT": (
        "Backward transfer (BWT)",
        "Mean change of earlier tasks since they were learnt; below zero is forgetting.",
        True,
    ),
    "MAA": ("Average (MAA)", "Mean over the stages of the mean score of the tasks seen so far.", False),
    "forgetting": ("Forgetting", "Mean loss of earlier tasks from their best score; lower is better.", False),
    "FWT": ("Forward transfer (FWT)", "Mean gain over zero-shot just before a task is learnt.", True),
    "BWT_T": ("BWT, divided by T", "Backward transfer as CoIN and BranchLoRA print it.", True),
    "AVG": (
        "All stages (AVG)",
        "Mean over all stages and all tasks, also those not learnt yet, as D-MoLE prints it.",
        False,
    ),
}
"""Key of a summary -> heading, explanation, whether it has a sign; in the order of the page."""


def write_report(root: Path, results: Results, config_yaml: str, image_of: ImageOf | None = None) -> Path:
    """Write `report.html` into a run directory, atomically.

    Args:
        root: the run directory; sample answers are read from its `predictions` folder.
        results: what to report, also of a run that is not finished.
        config_yaml: the resolved configuration, shown as it is.
        image_of: finds the picture of a test row; None shows the samples without pictures.

    Returns:
        The path of the page.
    """
    body = [
        _header(results),
        _matrix(results),
        _curves(results),
        _routing(results),
        _bars(results),
        _cost(results.cost),
        _samples(root, results, image_of),
        f"<details><summary>Configuration</summary><pre>{escape(config_yaml)}</pre></details>",
    ]
    template = Template(files(__package__).joinpath("report_template.html").read_text(encoding="utf-8"))
    page = template.substitute(
        title=escape(f"{results.experiment}: {results.strategy}"),
        light_colours=" ".join(f"--t{n}: {colour};" for n, colour in enumerate(TASK_LIGHT)),
        dark_colours=" ".join(f"--t{n}: {colour};" for n, colour in enumerate(TASK_DARK)),
        body="\n".join(part for part in body if part),
    )
    path = root / REPORT_FILE
    write_atomic(path, page)
    return path


def _header(results: Results) -> str:
    matrix = results.matrix
    last = matrix.last_row()
    done = 0 if last is None else last + 1
    total = len(results.tasks)
    progress = "finished" if done == total else f"{done} of {total} stages evaluated"
    facts = {
        "Strategy": results.strategy,
        "Backbone": results.backbone,
        "Seed": str(results.seed),
        "Tasks": str(total),
        "State": progress,
    }
    if results.zero_shot is not None and None not in results.zero_shot:
        facts["Zero-shot mean"] = number_text(sum(score or 0.0 for score in results.zero_shot) / total)
    summary = results.summary
    tiles = []
    for key, (heading, why, signed) in TILES.items():
        value = summary[key]
        shown = number_text(value, signed=signed, digits=2)
        tiles.append(
            f'<div class="tile{" none" if value is None else ""}"><dt>{heading}</dt><dd class="value">{shown}</dd>'
            f'<dd class="why">{why}</dd></div>'
        )
    notes = []
    if len(set(results.metrics.values())) > 1:
        kinds = ", ".join(f"{task}: {metric}" for task, metric in results.metrics.items())
        notes.append(f"The means run over different metrics ({kinds}).")
    for task, counts in results.notes.get("data", {}).items():
        if counts.get("shortened") or counts.get("dropped"):
            notes.append(
                f"{task}: {counts['shortened']} training samples were shortened and {counts['dropped']} dropped."
            )
    if any(value is None for value in summary.values()):
        notes.append(
            f"{NONE} marks a value that this run does not define, for example because later tasks were not evaluated."
        )
    return (
        f'<header><h1>{escape(results.experiment)}</h1><dl class="facts">'
        + "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
        + f'</dl><dl class="tiles">{"".join(tiles)}</dl>'
        + "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
        + "</header>"
    )


def _section(heading: str, why: str, *content: str) -> str:
    explanation = f'<p class="soft">{why}</p>' if why else ""
    return f"<section><h2>{heading}</h2>{explanation}{''.join(content)}</section>"


def _cell(score: float | None, *, own: bool = False) -> str:
    if score is None:
        return '<td class="empty"></td>'
    light, dark = score_colour(score), score_colour(score, dark=True)
    colours = f"--l:{css(light)};--li:{css(ink(light))};--d:{css(dark)};--di:{css(ink(dark))}"
    kind = ' class="own"' if own else ""
    return f'<td{kind} style="{colours}">{number_text(score)}</td>'


def _matrix(results: Results) -> str:
    head = "".join(f'<th scope="col"><span>{escape(task)}</span></th>' for task in results.tasks)
    before = ""
    if results.zero_shot is not None:
        cells = "".join(_cell(score) for score in results.zero_shot)
        before = f'<tbody><tr><th scope="row"><span>Before training</span></th>{cells}</tr></tbody>'
    rows = []
    for row in results.matrix.filled_rows():
        cells = "".join(_cell(score, own=row == column) for column, score in enumerate(results.matrix.scores[row]))
        rows.append(f'<tr><th scope="row"><span>{escape(results.row_name(row))}</span></th>{cells}</tr>')
    return _section(
        "Accuracy matrix",
        "Score in percent on each task (column) after each stage (row). Bold: the task just learnt. "
        "Reading down a column shows what later stages did to the task.",
        f'<div class="scroll"><table class="matrix"><thead><tr><th><span>After learning</span></th>{head}</tr></thead>',
        f"{before}<tbody>{''.join(rows)}</tbody></table></div>",
    )


def _routing(results: Results) -> str:
    """True task against the task whose router or expert was chosen, after the last stage."""
    if results.routing is None:
        return ""
    confusion: dict[str, dict[str, int]] = results.routing["confusion"]
    found = {routed for counts in confusion.values() for routed in counts}
    columns = [*(task for task in results.tasks if task in found), *sorted(found - set(results.tasks))]
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in columns)
    rows = []
    for task, counts in confusion.items():
        total = sum(counts.values())
        cells = "".join(
            _cell(100 * counts[name] / total, own=name == task) if name in counts else _cell(None) for name in columns
        )
        rows.append(f'<tr><th scope="row"><span>{escape(task)}</span></th>{cells}</tr>')
    return _section(
        "Routing",
        f"Share of a task's samples (row, percent) that were routed to each task (column) after the last stage. "
        f"Right for {number_text(results.routing['accuracy'])} % of the samples of learnt tasks.",
        f'<div class="scroll"><table class="matrix"><thead><tr><th><span>Samples of</span></th>{head}</tr></thead>',
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def _curves(results: Results) -> str:
    stages = results.matrix.filled_rows()
    rows = [results.matrix.scores[row] for row in stages]
    ticks = [str(number) for number in range(1, len(stages) + 1)]
    hints = [f"after stage {number} ({results.row_name(row)})" for number, row in enumerate(stages, start=1)]
    if results.zero_shot is not None:
        rows, ticks, hints = [results.zero_shot, *rows], ["start", *ticks], ["before training", *hints]
    lines = [
        Line(
            name=task,
            style=column,
            values=[row[column] for row in rows],
            solid_from=len(rows) - sum(row >= column for row in stages),
        )
        for column, task in enumerate(results.tasks)
        if any(results.matrix.scores[row][column] is not None for row in stages)
    ]
    if len(rows) < 2:
        return ""
    legend = "".join(
        f'<li style="color:var(--t{line.style % 8})"><i></i><span>{escape(line.name)}</span></li>' for line in lines
    )
    title = "Score of every task after each stage"
    wide = line_chart(lines, ticks, hints, width=1000, height=380, labels=True, title=title)
    narrow = line_chart(lines, ticks, hints, width=360, height=280, labels=False, title=title)
    return _section(
        "Forgetting curves",
        "Score of every task after each stage; dotted before the task was learnt.",
        f'<div class="wide">{wide}</div><div class="narrow">{narrow}<ul class="legend">{legend}</ul></div>',
    )


def _bars(results: Results) -> str:
    rows = []
    for task in results.tasks:
        learnt, final = results.matrix.learnt(task), results.matrix.final(task)
        if learnt is None or final is None:
            continue
        change = final - learnt
        kind = "down" if change <= -0.05 else "up" if change >= 0.05 else "soft"
        bars = "".join(
            f'<span class="bar {name}" style="width:{min(max(v, 0), 100):.1f}%"></span>'
            for name, v in (("learnt", learnt), ("final", final))
        )
        rows.append(
            f'<div class="task"><div class="name">{escape(task)}</div><div class="pair">{bars}</div>'
            f'<div class="numbers">{number_text(learnt)} \N{RIGHTWARDS ARROW} {number_text(final)} '
            f'<span class="{kind}">({number_text(change, signed=True)})</span></div></div>'
        )
    if len(rows) < 2:  # nothing was learnt after it
        return ""
    return _section(
        "Plasticity and stability",
        "",
        '<div class="key"><span><i class="learnt"></i>just learnt</span>',
        '<span><i class="final"></i>after the last stage</span></div>',
        f'<div class="bars">{"".join(rows)}</div>',
    )


def _cost(cost: list[CostRow]) -> str:
    if not cost:
        return ""
    heads = ("Stage", "Trainable", "Stored", "Training", "Samples/s", "Evaluation", "Samples/s", "Peak memory")
    rows = []
    for entry in cost:
        values = (
            count_text(entry.trainable_params),
            count_text(entry.stored_params),
            seconds_text(entry.train_seconds),
            number_text(entry.train_samples_per_second),
            seconds_text(entry.eval_seconds),
            number_text(entry.eval_samples_per_second),
            bytes_text(entry.peak_memory_bytes),
        )
        cells = "".join(f"<td>{value}</td>" for value in values)
        rows.append(f'<tr><th scope="row">{escape(entry.stage)}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    return _section(
        "Cost",
        "Parameters that were trained in a stage and that must be kept after it, without the pretrained model.",
        f'<div class="scroll"><table class="lines"><thead><tr>{head}</tr></thead>',
        f"<tbody>{''.join(rows)}</tbody></table></div>",
    )


def _samples(root: Path, results: Results, image_of: ImageOf | None) -> str:
    parts = []
    for task in results.tasks:
        if chosen := choose_samples(root, results, task):
            cards = "".join(_card(task, sample, image_of) for sample in chosen)
            parts.append(f'<h3>{escape(task)}</h3><div class="cards">{cards}</div>')
    if not parts:
        return ""
    return _section(
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
        f'<p class="question">{escape(_short(str(sample.final["prompt"]), 280))}</p><dl>{items}</dl></div></article>'
    )


def _answer(row: dict[str, object]) -> str:
    right = float(str(row["score"])) >= RIGHT
    mark, word, kind = ("\N{CHECK MARK}", "right", "up") if right else ("\N{MULTIPLICATION X}", "wrong", "down")
    text = _short(str(row["text"]).strip(), 160) or "(empty)"
    return f'{escape(text)} <span class="mark {kind}" role="img" aria-label="{word}">{mark}</span>'


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
