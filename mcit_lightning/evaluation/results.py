"""What a run found, in memory and as `results.json` and `accuracy_matrix.csv` in the run directory."""

import csv
import io
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from mcit_lightning.evaluation.files import checked_json, read_checked_json, write_atomic
from mcit_lightning.evaluation.held_out import HeldOut
from mcit_lightning.evaluation.results_check import check_results
from mcit_lightning.evaluation.transfer import TransferMatrix

RESULTS_FILE = "results.json"
MATRIX_FILE = "accuracy_matrix.csv"


@dataclass
class CostRow:
    """What a stage cost. A field is None until it is measured."""

    stage: str
    """Name of the stage."""
    folder: str
    """Directory of the stage, below the run directory and below `predictions`."""
    row: int
    """0-based row of the accuracy matrix that the stage fills."""
    trainable_params: int | None = None
    stored_params: int | None = None
    """Parameters that must be kept to run the model after this stage, without the pretrained ones."""
    proxy_seconds: float | None = None
    """Time of the gradient probe before the stage."""
    router_seconds: float | None = None
    """Time to make the stage's router, before its training (features of its samples, and the fit) or after it."""
    train_seconds: float | None = None
    """Wall-clock time of the training loop without validation; interruptions and lost work do not count."""
    train_samples_per_second: float | None = None
    eval_seconds: float | None = None
    eval_samples_per_second: float | None = None
    routing_seconds_per_sample: float | None = None
    """Time to decide where an evaluated sample is routed, over all that were; on several ranks, of rank zero."""
    first_routing_seconds_per_sample: float | None = None
    """The same, over those whose features had to be computed: it remembers a sample that it has seen. None if it knew all."""
    generation_seconds_per_sample: float | None = None
    """Time to generate its answer, routing left out."""
    peak_memory_bytes: int | None = None
    """Highest accelerator memory in training, the largest over the ranks; on a CPU the process's resident memory."""


@dataclass
class Results:
    """Everything that is reported about a run.

    Args:
        experiment: name of the experiment.
        strategy: name of the continual-learning strategy.
        backbone: folder or hub name of the pretrained model.
        seed: seed of the run.
        tasks: names in the order in which they are learnt.
        metrics: task -> name of its metric.
        routing: what `routing_summary` counted after the last stage, where the strategy has a router, and its accuracy and
            rejections after every stage (`per_stage`, `rejected_per_stage`).
        cost: one row per stage, in order.
        allocation: stage -> what a strategy with a budget decided for it: `ratios`, `budget` and `difficulty` per tower,
            `scores` and `ranks` per module.
        modules: tower -> module path -> names of its branches, in the model's order; candidates that got none have an empty
            list. Of the model that was evaluated last.
        freezing: stage -> module path -> the branches that the stage used most and that froze after it; a branch of an earlier
            stage may be there again.
        held_out: scores on tasks that are never trained, outside of the matrix.
        notes: anything else worth keeping, for example the counts of shortened and dropped samples (JSON types only).

    The accuracy matrix with the zero-shot row is `matrix`, empty at first.
    """

    experiment: str
    strategy: str
    backbone: str
    seed: int
    tasks: list[str]
    metrics: dict[str, str]
    routing: dict[str, Any] | None = None
    cost: list[CostRow] = field(default_factory=list)
    allocation: dict[str, Any] = field(default_factory=dict)
    modules: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    freezing: dict[str, dict[str, list[str]]] = field(default_factory=dict)
    held_out: HeldOut = field(default_factory=HeldOut)
    notes: dict[str, Any] = field(default_factory=dict)
    matrix: TransferMatrix = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = TransferMatrix(self.tasks)
        if set(self.metrics) != set(self.tasks):
            raise ValueError(f"metrics are given for {sorted(self.metrics)}, the tasks are {self.tasks}")

    @property
    def zero_shot(self) -> list[float | None] | None:
        """Scores before any training, or None."""
        return self.matrix.zero_shot

    @property
    def summary(self) -> dict[str, float | None]:
        """The summaries after the last evaluated stage."""
        return self.matrix.summary()

    @property
    def summary_per_stage(self) -> list[dict[str, float | None]]:
        """The summaries after every row of the matrix, as if the sequence had ended there."""
        return [self.matrix.summary(row) for row in range(len(self.tasks))]

    def cost_row(self, stage: str, folder: str, row: int) -> CostRow:
        """The cost row of a stage, appended if it is new."""
        for entry in self.cost:
            if entry.folder == folder:
                return entry
        self.cost.append(CostRow(stage=stage, folder=folder, row=row))
        self.cost.sort(key=lambda entry: entry.folder)
        return self.cost[[entry.folder for entry in self.cost].index(folder)]

    def folder_of(self, row: int) -> str | None:
        """Directory of the stage that filled a row of the matrix, or None if no stage did."""
        return next((entry.folder for entry in self.cost if entry.row == row), None)

    def row_name(self, row: int) -> str:
        """What a row of the matrix is called: the stage that filled it, else the row's task."""
        return next((entry.stage for entry in self.cost if entry.row == row), self.tasks[row])

    def to_dict(self) -> dict[str, Any]:
        """The content of `results.json`."""
        return {
            "experiment": self.experiment,
            "strategy": self.strategy,
            "backbone": self.backbone,
            "seed": self.seed,
            "metrics": dict(self.metrics),
            **self.matrix.to_dict(),
            "summary": self.summary,
            "summary_per_stage": self.summary_per_stage,
            "routing": self.routing,
            "allocation": self.allocation,
            "modules": self.modules,
            "freezing": self.freezing,
            "held_out": self.held_out.to_dict(),
            "cost": [asdict(row) for row in self.cost],
            "notes": self.notes,
        }

    @classmethod
    def load(cls, root: Path) -> "Results":
        """Read `results.json` of a run directory, also one that an older version wrote.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of a newer version; the message names the file and what to do.
        """
        path = root / RESULTS_FILE
        try:
            values = read_checked_json(path.read_text(encoding="utf-8"))
            check_results(values)
        except ValueError as error:  # a UnicodeDecodeError and a JSONDecodeError are, too
            raise _damaged(path, error) from error
        newer = sorted({key for row in values["cost"] for key in row} - {known.name for known in fields(CostRow)})
        if newer:
            raise ValueError(
                f"{path}: cost: unknown key {', '.join(newer)}; a newer version of mcit_lightning wrote the file. "
                "Use that version, or start the run again with overwrite=true."
            )
        try:
            results = cls(
                experiment=values["experiment"],
                strategy=values["strategy"],
                backbone=values["backbone"],
                seed=values["seed"],
                tasks=values["tasks"],
                metrics=values["metrics"],
                routing=values["routing"],
                cost=[CostRow(**row) for row in values["cost"]],
                allocation=values.get("allocation", {}),
                modules=values.get("modules", {}),
                freezing=values.get("freezing", {}),
                held_out=HeldOut.from_dict(values.get("held_out", {})),
                notes=values["notes"],
            )
            results.matrix = TransferMatrix.from_dict(values)
            return results
        except ValueError as error:
            raise _damaged(path, error) from error

    def save(self, root: Path) -> None:
        """Write `results.json` and `accuracy_matrix.csv`, each atomically.

        Raises:
            OSError: the disk is full or not writable; the old files are then still there.
        """
        write_atomic(root / RESULTS_FILE, checked_json(self.to_dict()))
        write_atomic(root / MATRIX_FILE, self.to_csv())

    def to_csv(self) -> str:
        """The matrix as text: a row per stage, headed by its name, a column per task, empty where not evaluated."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["after", *self.tasks])
        rows = [(self.row_name(row), scores) for row, scores in enumerate(self.matrix.scores)]
        if self.zero_shot is not None:
            rows.insert(0, ("zero_shot", self.zero_shot))
        for name, scores in rows:
            writer.writerow([name, *("" if score is None else f"{score:.4f}" for score in scores)])
        return out.getvalue()


def _damaged(path: Path, error: ValueError) -> ValueError:
    return ValueError(
        f"{path} is damaged ({error}). Restore it from a copy, or start the run again with overwrite=true."
    )
