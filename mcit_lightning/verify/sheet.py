"""Contact sheets: some samples of a task as one picture, question and answer under each image. Drawn with Pillow alone."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageOps

from mcit_lightning.data.images import load_image
from mcit_lightning.data.records import Parts, Sample
from mcit_lightning.verify.rows import Survey, answer_text
from mcit_lightning.verify.typeset import Type

Colour = tuple[int, int, int]

COLUMNS = 6
IMAGE = (208, 156)
GAP = 16
LINE = 17
HEAD, SECTION = 74, 46
QUESTION_LINES, ANSWER_LINES = 4, 3
BARS = 8
"""Most frequent answers of a split that are shown."""
PAGE, BOX, BAR = (255, 255, 255), (238, 240, 243), (188, 213, 238)
TEXT, FAINT, ANSWER, WRONG = (23, 27, 33), (98, 106, 117), (0, 92, 160), (178, 34, 34)
MOSAIC = 4
"""Images of one sample that are shown."""


class Card(NamedTuple):
    """A sample and the lines under its images."""

    sample: Sample
    caption: list[tuple[str, Colour]]


class Section(NamedTuple):
    """A split: what is written above its samples, and the samples in rows."""

    survey: Survey
    title: str
    cards: list[list[Card]]

    def height(self) -> int:
        """In pixels."""
        return SECTION + _bars_height(self.survey) + sum(_row_height(row) for row in self.cards)


def contact_sheet(
    task: str, subtitle: str, surveys: Sequence[Survey], *, samples: int, font: Path | None = None
) -> Image.Image:
    """Draw samples of each split of a task, below the shares of its most frequent answers.

    Args:
        task: name of the task.
        subtitle: a line below it.
        surveys: its splits.
        samples: how many of each split.
        font: a TrueType file, for scripts that Pillow's own font lacks.

    Raises:
        ValueError: the font cannot be read.
    """
    pen = Type(font)
    sections = [_section(survey, samples, pen) for survey in surveys]
    columns = max(3, *(len(row) for section in sections for row in section.cards), 3)
    width = GAP + columns * (IMAGE[0] + GAP)
    page = Image.new("RGB", (width, HEAD + sum(section.height() for section in sections)), PAGE)
    draw = ImageDraw.Draw(page)
    draw.text((GAP, 14), pen.cut(task, pen.large, width - 2 * GAP), fill=TEXT, font=pen.large)
    draw.text((GAP, 46), pen.cut(subtitle, pen.small, width - 2 * GAP), fill=FAINT, font=pen.small)
    top = HEAD
    for section in sections:
        draw.line((GAP, top, width - GAP, top), fill=BOX, width=2)
        draw.text((GAP, top + 14), pen.cut(section.title, pen.medium, width - 2 * GAP), fill=TEXT, font=pen.medium)
        _bars(draw, pen, section.survey, top + SECTION, min(width, 4 * (IMAGE[0] + GAP)) - 2 * GAP)
        y = top + SECTION + _bars_height(section.survey)
        for row in section.cards:
            for number, card in enumerate(row):
                _draw(page, draw, pen, GAP + number * (IMAGE[0] + GAP), y, card)
            y += _row_height(row)
        top += section.height()
    return page


def varied(survey: Survey, count: int) -> list[tuple[int, Parts]]:
    """Rows to show, in the file's order: as many different answers as possible, and no picture twice while there are others."""
    answers: dict[str, int] = {}
    pictures: dict[object, int] = {}
    keys: list[tuple[int, int, int]] = []
    for position, (_, parts) in enumerate(survey.drawn):
        named = parts.images and all(isinstance(name, str) for name in parts.images)
        picture: object = parts.images if named else position
        answer = _answer(parts)
        keys.append((pictures.get(picture, 0), answers.get(answer, 0), position))
        pictures[picture] = pictures.get(picture, 0) + 1
        answers[answer] = answers.get(answer, 0) + 1
    best = [survey.drawn[position] for _, _, position in sorted(keys)[:count]]
    return sorted(best, key=lambda drawn: drawn[0])


def _section(survey: Survey, samples: int, pen: Type) -> Section:
    cards = [_card(survey, row, parts, pen) for row, parts in varied(survey, samples)]
    title = f"{survey.split}: {len(cards)} of {survey.rows:,} rows, {len(survey.answers):,} different answers"
    return Section(survey, title, [cards[start : start + COLUMNS] for start in range(0, len(cards), COLUMNS)])


def _card(survey: Survey, row: int, parts: Parts, pen: Type) -> Card:
    sample = survey.sample(row, parts)
    questions = [text for role, text in parts.turns if role == "user"]
    more = len(sample.images) - MOSAIC
    place = f"row {row + 1} \N{MIDDLE DOT} {parts.id}" + (f" \N{MIDDLE DOT} {more} more images" if more > 0 else "")
    answer = _answer(parts).strip() or "(empty)"
    if survey.split != "test" and len(questions) > 1:
        answer += f"  (+{len(questions) - 1} more)"
    question = questions[-1] if survey.split == "test" else questions[0]
    caption = [(pen.cut(place, pen.small, IMAGE[0]), FAINT)]
    caption += [(line, TEXT) for line in pen.wrap(question, IMAGE[0], QUESTION_LINES)]
    caption += [(line, ANSWER) for line in pen.wrap(answer, IMAGE[0], ANSWER_LINES)]
    return Card(sample, caption)


def _answer(parts: Parts) -> str:
    """The reference, or the first answer of a conversation."""
    if parts.reference is not None:
        return answer_text(parts.reference)
    return next((text for role, text in parts.turns if role == "assistant"), "")


def _row_height(row: list[Card]) -> int:
    return IMAGE[1] + 6 + LINE * max(len(card.caption) for card in row) + GAP


def _bars_height(survey: Survey) -> int:
    return LINE * min(BARS, len(survey.answers)) + GAP if survey.answers else 0


def _bars(draw: ImageDraw.ImageDraw, pen: Type, survey: Survey, y: int, width: int) -> None:
    """The most frequent answers with their shares as bars, of which the whole width would be all rows."""
    top = [
        (pen.cut(answer or "(empty)", pen.small, 0.4 * width), count)
        for answer, count in survey.answers.most_common(BARS)
    ]
    left = GAP + 10 + max((pen.small.getlength(answer) for answer, _ in top), default=0)
    room = width - left - 60
    for answer, count in top:
        share = count / survey.answers.total()
        right = left + max(1.0, share * room)
        draw.text((GAP, y), answer, fill=ANSWER, font=pen.small)
        draw.rectangle((left, y + 3, right, y + LINE - 4), fill=BAR)
        draw.text((right + 8, y), f"{100 * share:.1f} %", fill=FAINT, font=pen.small)
        y += LINE


def _draw(page: Image.Image, draw: ImageDraw.ImageDraw, pen: Type, x: int, y: int, card: Card) -> None:
    width, height = IMAGE
    centre = (x + width / 2, y + height / 2)
    draw.rectangle((x, y, x + width - 1, y + height - 1), fill=BOX)
    if card.sample.images:
        try:
            _paste(page, card.sample, x, y)
        except ValueError:
            draw.text(centre, "cannot be read", fill=WRONG, font=pen.medium, anchor="mm")
    else:
        draw.text(centre, "no image", fill=FAINT, font=pen.medium, anchor="mm")
    for number, (line, colour) in enumerate(card.caption):
        draw.text((x, y + height + 6 + number * LINE), line, fill=colour, font=pen.small)


def _paste(page: Image.Image, sample: Sample, x: int, y: int) -> None:
    shown = sample.images[:MOSAIC]
    across, down = (1, 1) if len(shown) == 1 else (2, -(-len(shown) // 2))
    size = (IMAGE[0] // across, IMAGE[1] // down)
    for number, source in enumerate(shown):
        picture = ImageOps.contain(load_image(source, sample), (size[0] - 2, size[1] - 2), Image.Resampling.LANCZOS)
        left = x + number % across * size[0] + (size[0] - picture.width) // 2
        upper = y + number // across * size[1] + (size[1] - picture.height) // 2
        page.paste(picture, (left, upper))
