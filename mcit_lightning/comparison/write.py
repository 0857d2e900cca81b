"""Writing a comparison: the page, the tables, and the same figures for TensorBoard."""

from collections.abc import Sequence
from pathlib import Path

from mcit_lightning.comparison.board import write_board
from mcit_lightning.comparison.find import find_runs
from mcit_lightning.comparison.grouping import compare_runs
from mcit_lightning.comparison.methods import Comparison
from mcit_lightning.comparison.page import PAGE_FILE, comparison_page
from mcit_lightning.comparison.samples import PicturesOf
from mcit_lightning.comparison.tables import comparison_tables
from mcit_lightning.evaluation.files import write_atomic
from mcit_lightning.evaluation.open_run import STATE_FILE


def write_comparison(
    paths: Sequence[Path], out: Path, pictures: PicturesOf, *, reference: str | None = None
) -> tuple[Comparison, Path]:
    """Compare the finished runs at `paths` and write everything into `out`.

    Args:
        paths: run directories, or folders of them.
        out: a folder; files of an earlier comparison in it are replaced, others stay.
        pictures: finds the test pictures of a run.
        reference: name of the method that the others are compared with; None chooses.

    Returns:
        What was compared, and the page.

    Raises:
        ValueError: a path holds no run, none is finished, a seed is there twice, the reference is unknown, or `out` is a run
            directory; nothing is written then.
        OSError: `out` cannot be written.
    """
    if (out / STATE_FILE).exists():
        raise ValueError(f"{out}: is the directory of a run; choose another folder for the comparison")
    runs, left_out = find_runs(paths)
    comparison = compare_runs(runs, left_out, reference)
    page, gallery = comparison_page(comparison, f"Comparison: {out.name}", pictures)
    for name, content in comparison_tables(comparison).items():
        write_atomic(out / name, content)
    write_atomic(out / PAGE_FILE, page)
    write_board(out / "tensorboard", comparison, gallery)
    return comparison, out / PAGE_FILE
