"""Pieces that the report's sections have in common."""

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from mcit_lightning.evaluation.colours import TASK_DARK, TASK_LIGHT, css, ink, score_colour
from mcit_lightning.evaluation.formatting import number_text
from mcit_lightning.evaluation.svg import Line, line_chart


def render_page(title: str, body: Sequence[str]) -> str:
    """A whole page of parts (HTML); empty parts are left out."""
    template = Template(files(__package__).joinpath("report_template.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(title),
        light_colours=" ".join(f"--t{n}: {colour};" for n, colour in enumerate(TASK_LIGHT)),
        dark_colours=" ".join(f"--t{n}: {colour};" for n, colour in enumerate(TASK_DARK)),
        body="\n".join(part for part in body if part),
    )


def section(heading: str, why: str, *content: str) -> str:
    """A headed part of the page, with a sentence or two on how to read it (`why` is HTML)."""
    explanation = f'<p class="soft">{why}</p>' if why else ""
    return f"<section><h2>{heading}</h2>{explanation}{''.join(content)}</section>"


def heat_cell(score: float | None, *, own: bool = False) -> str:
    """A cell of a heat-map in percent, empty for None; `own` prints it bold."""
    if score is None:
        return '<td class="empty"></td>'
    kind = ' class="own"' if own else ""
    return f'<td{kind} style="{score_style(score)}">{number_text(score)}</td>'


def score_style(score: float) -> str:
    """Colours of a score and of the text on it, light and dark, as CSS variables."""
    light, dark = score_colour(score), score_colour(score, dark=True)
    return f"--l:{css(light)};--li:{css(ink(light))};--d:{css(dark)};--di:{css(ink(dark))}"


def heat_row(name: str, cells: str) -> str:
    """A row of a heat-map."""
    return f'<tr><th scope="row"><span>{escape(name)}</span></th>{cells}</tr>'


def heat_table(corner: str, columns: Sequence[str], *bodies: Sequence[str]) -> str:
    """A heat-map in a box of its own that scrolls where it is too wide.

    Args:
        corner: what the rows are.
        columns: their headings.
        bodies: groups of rows, set apart from each other; empty ones are left out.
    """
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in columns)
    groups = "".join(f"<tbody>{''.join(rows)}</tbody>" for rows in bodies if rows)
    return (
        f'<div class="scroll"><table class="matrix"><thead><tr><th><span>{corner}</span></th>{head}</tr></thead>'
        f"{groups}</table></div>"
    )


def line_table(columns: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    """A plain table that scrolls where it is too wide; headings and cells are HTML, the names of the rows are not."""
    head = "".join(f'<th scope="col">{name}</th>' for name in columns)
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for name, cells in rows
    )
    return f'<div class="scroll"><table class="lines"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def chart(lines: list[Line], ticks: list[str], hints: list[str], *, title: str, height: int) -> str:
    """Curves over stages twice: with labels for a wide page, with a legend for a phone."""
    wide = line_chart(lines, ticks, hints, width=1000, height=height, labels=True, title=title)
    narrow = line_chart(lines, ticks, hints, width=360, height=min(height, 280), labels=False, title=title)
    below = legend([(line.name, line.style) for line in lines])
    return f'<div class="wide">{wide}</div><div class="narrow">{narrow}{below}</div>'


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Names of curves with the numbers of their colours; from the ninth on the lines are dashed, and so are their marks."""
    items = "".join(
        f'<li class="t{style % 8}{" alt" if style >= 8 else ""}"><i></i><span>{escape(name)}</span></li>'
        for name, style in entries
    )
    return f'<ul class="legend">{items}</ul>'


def shortened(text: str, length: int) -> str:
    """At most so many characters, with an ellipsis where some are missing."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"
