"""TensorBoard over a whole run: one continuous training axis through all stages, and the forgetting curves."""

import re
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator
from typing_extensions import override

from mcit_lightning.evaluation.figures import matrix_image, placement_image
from mcit_lightning.evaluation.results import Results

CURVES = "forgetting"
"""Tags `forgetting/<task>` hold the score of a task after each stage."""
SUMMARIES = ("MFT", "MFN", "MAA", "BWT")


class StageTensorBoardLogger(TensorBoardLogger):
    """Writes to `<root>/tensorboard` with two axes.

    Training and evaluation scalars of the Trainer are placed at the optimizer step of the whole run: every stage's
    Trainer counts from zero, and `step_offset` holds the steps of the stages before. The forgetting curves have the
    number of the stage as their
    step: 1 after the first stage, 0 for the zero-shot evaluation.

    Args:
        root: the run directory.
        step_offset: optimizer steps of all finished stages; the runner advances it before each stage.
    """

    def __init__(self, root: Path, *, step_offset: int = 0) -> None:
        super().__init__(save_dir=root, name="tensorboard", version="", default_hp_metric=False)
        self.step_offset = step_offset
        self._orphans = bool(_event_files(Path(self.log_dir)))
        self._check_curves = self._orphans
        self._has_layout = False

    @rank_zero_only
    def resume_from(self, step: int) -> None:
        """Hide what an interrupted process wrote from a step of the current stage on, because that work is repeated.

        Call it before every training; it does something only before the first one of a process that found earlier events.

        Args:
            step: optimizer steps of the stage that its checkpoint holds; 0 if the stage starts over. `step_offset` is
                set already.
        """
        if not self._orphans:
            return
        self._orphans = False
        self._check_curves = True
        self.experiment.close()  # the next write opens a new file; its head voids older events from that step on
        _wait_for_a_later_name(Path(self.log_dir))
        self.experiment.purge_step = self.step_offset + step
        self.experiment.flush()

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write out what is pending, and keep the file open: a process has one file, not one per fit and test."""
        self.experiment.flush()

    @rank_zero_only
    def close(self) -> None:
        """Close the file at the end of the run."""
        self.experiment.close()

    @override
    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        super().log_metrics(metrics, None if step is None else step + self.step_offset)

    @rank_zero_only
    def log_forgetting(self, results: Results, stage: int) -> None:
        """Add the scores and summaries after a stage to the curves; the matrix, and where experts were placed, as pictures.

        Args:
            results: the results, the stage's included.
            stage: 1-based row of the matrix that the stage filled; 0 for the zero-shot evaluation.
        """
        if not self._has_layout:
            self.experiment.add_custom_scalars(_layout(results.tasks))
            self._has_layout = True
        rows = [stage]
        if self._check_curves:  # a killed process may have written this row, and a purge may have hidden earlier ones
            self.experiment.flush()
            there = _curve_steps(Path(self.log_dir))
            rows = [row for row in range(stage + 1) if row not in there]
            self._check_curves = False
        for row in rows:
            self._log_row(results, row)
        self.experiment.add_image("accuracy_matrix", matrix_image(results.matrix), stage, dataformats="HWC")
        if results.allocation and results.modules:
            self.experiment.add_image("placement", placement_image(results), stage, dataformats="HWC")
        self.experiment.flush()

    def _log_row(self, results: Results, stage: int) -> None:
        super().log_metrics(curve_values(results, stage), stage)


def curve_values(results: Results, stage: int) -> dict[str, float]:
    """Tag -> value of the forgetting curves and summaries after a stage; 0 is the zero-shot evaluation."""
    scores = results.zero_shot if stage == 0 else results.matrix.scores[stage - 1]
    summary = results.matrix.summary(stage - 1) if stage > 0 else {}
    values = {f"{CURVES}/{task}": score for task, score in zip(results.tasks, scores or (), strict=bool(scores))}
    values.update({f"summary/{name}": summary.get(name) for name in SUMMARIES})
    values.update({f"held_out/{task}": score for task, score in results.held_out.row(stage).items()})
    return {tag: value for tag, value in values.items() if value is not None}


def _curve_steps(folder: Path) -> set[int]:
    """Stages whose scores a reader of the folder sees."""
    events = EventAccumulator(str(folder), size_guidance={SCALARS: 0})
    events.Reload()
    tags = [tag for tag in events.Tags()[SCALARS] if tag.startswith(f"{CURVES}/")]
    return {event.step for tag in tags for event in events.Scalars(tag)}


def _event_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("events.out.tfevents.*"))


def _wait_for_a_later_name(folder: Path) -> None:
    """Readers take the files of a folder in the order of their names, which begin with the second of their opening.

    A file that voids older events must come after them, so wait for the next second where the newest file is of this one.
    """
    newest = max(int(path.name.split(".")[3]) for path in _event_files(folder))
    for _ in range(30):
        if int(time.time()) != newest:
            break
        time.sleep(0.05)


def _layout(tasks: list[str]) -> dict[str, dict[str, list[Any]]]:
    """The page "Custom scalars": all forgetting curves in one chart, the summaries in another."""

    def exactly(tags: list[str]) -> list[str]:
        return [f"^{re.escape(tag)}$" for tag in tags]

    return {
        "Continual learning": {
            "Forgetting curves (score after each stage)": [
                "Multiline",
                exactly([f"{CURVES}/{task}" for task in tasks]),
            ],
            "Summaries after each stage": ["Multiline", exactly([f"summary/{name}" for name in SUMMARIES])],
        }
    }
