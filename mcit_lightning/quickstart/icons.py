"""The task of icons: glyphs of the icon fonts that QtAwesome carries, drawn with Pillow (no Qt involved)."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from mcit_lightning.quickstart.canvas import balanced, dark, pale, place
from mcit_lightning.quickstart.layout import SPLITS, Sample, Task
from mcit_lightning.quickstart.packages import folder_of

# word -> names that the fonts give it
WORDS = {
    "anchor": ("anchor",),
    "bell": ("bell",),
    "bicycle": ("bicycle", "bike"),
    "book": ("book",),
    "bus": ("bus",),
    "camera": ("camera",),
    "cloud": ("cloud",),
    "eye": ("eye",),
    "flag": ("flag",),
    "folder": ("folder",),
    "gear": ("gear", "cog", "settings"),
    "gift": ("gift",),
    "heart": ("heart",),
    "house": ("home", "house"),
    "key": ("key",),
    "lock": ("lock",),
    "plane": ("plane", "airplane"),
    "rocket": ("rocket",),
    "star": ("star",),
    "umbrella": ("umbrella",),
}
# The words that the task asks for; the projector's alignment leaves out all of the above. Ten are learnt in a quickstart's steps.
ASKED = ("anchor", "bell", "bicycle", "camera", "cloud", "heart", "house", "key", "star", "umbrella")
QUESTION = "What is shown in this picture? Answer with one word."

# Fonts of the training pictures, and the one whose drawings only the test shows. Both styles, filled and outlined.
TRAIN_FONTS = ("fontawesome5-solid", "fontawesome5-regular", "fontawesome6-solid", "fontawesome6-regular",
               "materialdesignicons6", "remixicon", "elusiveicons")  # fmt: skip
TEST_FONTS = ("phosphor",)
_STYLE = re.compile(r"(-\d)?(-(fill|filled|line|outline|variant|alt|simple|straight|bold|light|regular))*")
_PIXELS = 128


@dataclass(frozen=True)
class Glyph:
    """One character of one font."""

    name: str
    character: str
    font: Path

    def draw(self, ink: tuple[int, int, int]) -> Image.Image:
        """The glyph, cut to its outline, on a transparent ground."""
        picture = Image.new("RGBA", (2 * _PIXELS, 2 * _PIXELS), (*ink, 0))
        font = ImageFont.truetype(str(self.font), _PIXELS, layout_engine=ImageFont.Layout.BASIC)
        ImageDraw.Draw(picture).text((_PIXELS, _PIXELS), self.character, font=font, fill=(*ink, 255), anchor="mm")
        return picture.crop(picture.getchannel("A").getbbox())


def glyphs(font: str) -> list[Glyph]:
    """All glyphs of a font, sorted by name."""
    folder = folder_of("QtAwesome") / "fonts"
    pattern = re.compile(rf"{re.escape(font)}(-webfont)?-(charmap-)?[\d.]+\.(json|ttf)")
    files = {path.suffix: path for path in sorted(folder.iterdir()) if pattern.fullmatch(path.name)}
    names = json.loads(files[".json"].read_text(encoding="utf-8"))
    return [Glyph(name, chr(int(code, 16)), files[".ttf"]) for name, code in sorted(names.items())]


def shows(glyph: Glyph, word: str) -> bool:
    """Whether the glyph's name is one of the word's names, in whatever style."""
    return any(
        glyph.name.startswith(name) and _STYLE.fullmatch(glyph.name, len(name)) is not None for name in WORDS[word]
    )


def icons(size: int, counts: Mapping[str, int], seed: int) -> Task:
    """What an icon shows; the test icons are of a font that training never saw."""
    seen = [glyph for font in TRAIN_FONTS for glyph in glyphs(font)]
    unseen = [glyph for font in TEST_FONTS for glyph in glyphs(font)]
    splits = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}/icons/{split}")
        source = unseen if split == "test" else seen
        pools = {word: [glyph for glyph in source if shows(glyph, word)] for word in ASKED}
        samples = []
        for word in balanced(list(ASKED), counts[split], rng):
            picture = place(rng.choice(pools[word]).draw(dark(rng)), size, rng, pale(rng), scale=(0.6, 0.9))
            samples.append(Sample(picture, QUESTION, word))
        splits[split] = samples
    return Task("icons", splits, "QtAwesome", "MIT; fonts OFL-1.1, CC BY 4.0, Apache-2.0, MIT", "another icon font")
