"""A comparison in TensorBoard: the page's figures as pictures, and the curves of the means with a line per method."""

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from mcit_lightning.comparison.curves import cell_estimate
from mcit_lightning.comparison.gallery import Gallery
from mcit_lightning.comparison.measures import COSTS, SCORES
from mcit_lightning.comparison.methods import Comparison, Group, Method
from mcit_lightning.comparison.raster import rasterize
from mcit_lightning.comparison.statistics import Estimate
from mcit_lightning.evaluation.transfer import SUMMARY

FIGURES = "figures"
"""The TensorBoard run that has the pictures."""


def write_board(folder: Path, comparison: Comparison, gallery: Gallery) -> None:
    """Write events below `folder`; those of an earlier comparison there are deleted first.

    A TensorBoard run per method (and order, if there are several) holds `score/<task>` and `summary/<name>`, means over the seeds
    after each stage, and `final/<measure>`. The run `figures` has the pictures.

    Raises:
        OSError: the folder cannot be written.
    """
    for old in folder.glob("**/events.out.tfevents.*"):
        old.unlink()
    for group in comparison.groups:
        for method in group.methods:
            name = method.name if len(comparison.groups) == 1 else f"{method.name}/order{group.number}"
            with SummaryWriter(folder / name) as writer:
                _scalars(writer, group, method)
    with SummaryWriter(folder / FIGURES) as writer:
        for name, svg in gallery.figures.items():
            writer.add_image(name, rasterize(svg), dataformats="HWC")


def _scalars(writer: SummaryWriter, group: Group, method: Method) -> None:
    for row in range(len(group.tasks)):
        for column, task in enumerate(group.tasks):
            if (cell := cell_estimate(method, row, column)) is not None:
                writer.add_scalar(f"score/{task}", cell.mean, row + 1)
        for key in SUMMARY:
            if (value := _summary(method, row, key)) is not None:
                writer.add_scalar(f"summary/{key}", value.mean, row + 1)
    for measure in (*SCORES, *COSTS):
        if (value := measure.of(method)) is not None:
            writer.add_scalar(f"final/{measure.key}", value.mean, 0)


def _summary(method: Method, row: int, key: str) -> Estimate | None:
    """Mean over the seeds of a summary after a stage."""
    return method.estimate(lambda run: run.results.summary_per_stage[row][key])
