"""Choosing a few test questions per task that show what was learnt and what was lost."""

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from mcit_lightning.data.images import open_picture
from mcit_lightning.evaluation.predictions import read_predictions
from mcit_lightning.evaluation.results import Results

ImageOf = Callable[[str, int], Path | Image.Image | None]
"""From a task and the number of a row in its test split to the row's picture, if there is one."""

RIGHT = 0.5
"""A score from here on counts as right where a sample is shown; the matrix uses the score itself."""


@dataclass(frozen=True)
class Sample:
    """One test question with the answers right after the task was learnt and at the end.

    Args:
        learnt: the row of the predictions after the task's own stage.
        final: the row after the last stage; the same one for the task learnt last.
    """

    learnt: dict[str, Any]
    final: dict[str, Any]


def choose_samples(root: Path, results: Results, task: str) -> list[Sample]:
    """At most four questions: first what was known and forgotten, then right both times, then never right.

    A run without a stage of the task's own (a joint run) shows the final answers alone.
    """
    last = results.matrix.last_row()
    if last is None:
        return []
    own = results.tasks.index(task)
    learnt = read_predictions(root, results.folder_of(own), task)
    final = read_predictions(root, results.folder_of(last), task) if own != last else learnt
    learnt, final = learnt or final, final or learnt
    pairs = [Sample(learnt[index], final[index]) for index in sorted(learnt.keys() & final.keys())]
    kinds: dict[tuple[bool, bool], list[Sample]] = {}
    for pair in pairs:
        kinds.setdefault((pair.learnt["score"] >= RIGHT, pair.final["score"] >= RIGHT), []).append(pair)
    order = [((True, False), 2), ((True, True), 2), ((False, False), 2), ((False, True), 1)]
    chosen: list[Sample] = []
    for kind, wanted in order:
        chosen.extend(kinds.get(kind, [])[: min(wanted, 4 - len(chosen))])
    return chosen


def thumbnail(source: Path | Image.Image, *, side: int = 176) -> str | None:
    """A small copy of a picture as a data URI; None if the file is missing or no picture."""
    try:
        picture = source if isinstance(source, Image.Image) else open_picture(source)
        small = picture.convert("RGBA")
    except Exception:  # decoders raise OSError, SyntaxError, ValueError, zlib and struct errors
        return None
    small.thumbnail((side, side))
    page = Image.new("RGB", small.size, "white")
    page.paste(small, mask=small.getchannel("A"))
    out = io.BytesIO()
    page.save(out, "JPEG", quality=82, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode("ascii")
