"""The figures of the documentation: drawn by `docs/figures/draw.py`, one in the section of every strategy."""

import importlib.util
import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import matplotlib
import pytest
from PIL import ImageFont

from mcit_lightning.strategies import STRATEGIES

DOCS = Path(__file__).resolve().parent.parent / "docs"
FOLDER = DOCS / "figures"
NAMES = sorted(path.stem for path in FOLDER.glob("*.svg"))
DEJAVU = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
FONTS = {True: ImageFont.truetype(DEJAVU, 11), False: ImageFont.truetype(DEJAVU, 12)}
"""Small -> the font of a text."""
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def draw() -> ModuleType:
    spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_figures_are_those_that_are_drawn(draw: ModuleType) -> None:
    figures = draw.read_figures((FOLDER / "figures.txt").read_text(encoding="utf-8"))
    drawn = {name: draw.draw(figure) for name, figure in figures.items()}
    kept = {name: (FOLDER / f"{name}.svg").read_text(encoding="utf-8") for name in NAMES}
    assert drawn == kept, "run `python docs/figures/draw.py`, and remove what it no longer draws"


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_readable_in_light_and_dark(name: str) -> None:
    root = ET.parse(FOLDER / f"{name}.svg").getroot()
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    style = root.findtext(f"{SVG}style", "")
    assert "prefers-color-scheme: dark" in style
    known = set(re.findall(r"\.([a-z-]+)", style)) | {"on-frozen", "on-used", "on-routes", "on-kept"}
    for mark in root.iter():
        assert set(mark.get("class", "").split()) <= known
    texts = list(root.iter(f"{SVG}text"))
    assert texts and all(text.text for text in texts)
    for place in texts:  # where it is cut, browsers say (fonts differ); that it starts inside, this does
        assert 0 <= float(place.attrib["x"]) <= width and 10 <= float(place.attrib["y"]) <= height
    for box in root.iter(f"{SVG}rect"):
        x, y, wide, high = (float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + wide <= width and y + high <= height


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_cut_or_overlaps_another(name: str) -> None:
    """In DejaVu Sans, the widest of the fonts that the figures ask for."""
    root = ET.parse(FOLDER / f"{name}.svg").getroot()
    limit, spans = float(root.attrib["viewBox"].split()[2]), []
    for text in root.iter(f"{SVG}text"):
        styles, x = text.attrib["class"].split(), float(text.attrib["x"])
        assert text.text is not None
        width = FONTS["small" in styles].getlength(text.text)
        left = x - width / 2 if "middle" in styles else x
        spans.append((float(text.attrib["y"]), left, left + width, text.text))
        assert left >= 0 and left + width <= limit, f"{text.text!r} is cut"
    for (y, _, right, one), (below, left, _, two) in pairwise(sorted(spans)):
        assert y != below or right < left, f"{one!r} runs into {two!r}"


@pytest.mark.parametrize("name", list(STRATEGIES))
def test_every_strategy_has_its_section_and_figure(name: str) -> None:
    text = (DOCS / "strategies.md").read_text(encoding="utf-8")
    section = re.search(rf"^### .*\(`{name}`\)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL)
    assert section is not None, f"docs/strategies.md has no section for {name}: `### Title (`{name}`)`"
    assert re.search(r"^    \S", section[1], re.MULTILINE), "its formula, indented by four spaces"
    assert re.search(rf"^!\[.{{30,}}\]\(figures/{name}\.svg\)$", section[1], re.MULTILINE), "its figure, with alt text"
    assert f"(#{_anchor(section[0])})" in text, "its row in the table of strategies links to it"


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda page: page.stem)
def test_every_linked_figure_is_there(page: Path) -> None:
    for target in re.findall(r"\]\((figures/[^)]+)\)", page.read_text(encoding="utf-8")):
        assert (DOCS / target).is_file()


def test_a_line_that_says_nothing_is_refused(draw: ModuleType) -> None:
    with pytest.raises(ValueError, match="line 2"):
        draw.read_figures("[name]\nno key")


def _anchor(section: str) -> str:
    """GitHub's anchor of a section's heading."""
    heading = section.splitlines()[0].lstrip("# ")
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
