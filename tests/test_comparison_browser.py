"""The comparison's page in a real browser: every figure is drawn, at two widths and in both colour schemes."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from typing import Any

import pytest
from comparison_runs import make_run, make_sweep
from PIL import Image

from mcit_lightning.comparison.find import find_runs
from mcit_lightning.comparison.grouping import compare_runs
from mcit_lightning.comparison.page import comparison_page

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
WIDTHS = {"desktop": 1100, "phone": 390}
SCHEMES = {"dark": 0, "light": 1}
"""Values of Chromium's setting `preferredColorScheme`."""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(BROWSERS)} is installed"),
]

MEASURE = """
const inside = window.frames[0], page = inside.document, found = {};
const box = node => node.getBoundingClientRect();
const name = node => node.closest('figure').dataset.figure;
const svgs = [...page.querySelectorAll('figure svg')].filter(svg => box(svg).width > 0);
found.figures = [...page.querySelectorAll('figure')].map(figure => figure.dataset.figure);
found.drawn = svgs.filter(svg => box(svg).height > 20 &&
  [...svg.querySelectorAll('rect, circle, polyline')].some(mark => box(mark).width > 0 && box(mark).height >= 0)).map(name);
found.overlaps = [];
for (const svg of svgs) {
  const texts = [...svg.querySelectorAll('text')];
  texts.forEach((one, place) => texts.slice(place + 1).forEach(two => {
    const a = box(one), b = box(two);
    const wide = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const high = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (wide > 1 && high > 3) found.overlaps.push([name(svg), one.textContent, two.textContent]);
  }));
}
found.cut = svgs.flatMap(svg => [...svg.querySelectorAll('text')].filter(text =>
  box(text).left < box(svg).left - 1 || box(text).right > box(svg).right + 1).map(text => [name(svg), text.textContent]));
found.small = svgs.flatMap(svg => [...svg.querySelectorAll('text')].filter(text => box(text).height < 11).map(() => name(svg)));
found.wider = page.documentElement.scrollWidth - page.documentElement.clientWidth;
found.pictures = [...page.images].map(image => image.naturalWidth);
found.loaded = inside.performance.getEntriesByType('resource').map(entry => entry.name).filter(url => !url.startsWith('data:'));
found.background = inside.getComputedStyle(page.body).backgroundColor;
document.title = JSON.stringify(found);
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two orders, six methods: one with a long name, one with a single seed, two that end alike."""
    root = make_sweep(tmp_path_factory.mktemp("sweep"), seeds=3, orders=2)
    for seed in range(3):
        make_run(root / f"a_method_with_a_very_long_name/seed{seed}", strategy="ewc", seed=seed, lost=45.0)
    make_run(root / "one_seed/seed0", strategy="lwf", lost=12.5)
    make_run(root / "a_method_with_a_very_long_name/seed3", strategy="ewc", seed=3, finished=False)  # a long notice
    picture = Image.new("RGB", (40, 30), "red")
    return comparison_page(compare_runs(*find_runs([root])), "Comparison", lambda run: lambda task, index: picture)[0]


@pytest.fixture(scope="module")
def measured(page: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[dict[str, Any], str]]:
    """Width and scheme -> what was measured, and what the browser's console said.

    The page is in a frame, because a browser's own window has a least width that is larger than a phone's.
    """
    assert BROWSER is not None
    folder, results = tmp_path_factory.mktemp("browser"), {}
    for width, pixels in WIDTHS.items():
        frame = f'<iframe style="border:0;width:{pixels}px;height:900px" srcdoc="{escape(page)}"></iframe>'
        file = folder / f"{width}.html"
        file.write_text(f"<!doctype html><title>none</title>{frame}<script>onload = () => {{{MEASURE}}}</script>")
        for scheme, number in SCHEMES.items():
            command = [
                BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-extensions",
                f"--user-data-dir={folder / 'profile'}", f"--blink-settings=preferredColorScheme={number}",
                "--enable-logging=stderr", "--window-size=1300,900", "--dump-dom", file.as_uri(),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            title = re.search(r"<title>(.*?)</title>", done.stdout, re.DOTALL)
            assert title is not None and title[1] != "none", done.stderr
            results[width, scheme] = (json.loads(unescape(title[1])), done.stderr)
    return results


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn_and_readable(
    width: str, scheme: str, page: str, measured: dict[tuple[str, str], tuple[dict[str, Any], str]]
) -> None:
    found, console = measured[width, scheme]
    assert "CONSOLE" not in console, "errors of scripts and styles"
    assert len(found["figures"]) == page.count("data-figure=") > 40
    assert found["drawn"] == found["figures"], "each once: the drawing for the other width is hidden"
    assert found["overlaps"] == [] and found["cut"] == [] and found["small"] == []
    assert found["wider"] <= 0, "what is wider than the page scrolls in a box of its own"
    assert found["loaded"] == [] and found["pictures"] and min(found["pictures"]) > 0
    light = sum(int(part) for part in re.findall(r"\d+", found["background"])[:3]) / 3
    assert light > 200 if scheme == "light" else light < 50
