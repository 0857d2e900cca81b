"""The structure log: every decision that changed the model, as plain JSON that can be replayed on a fresh backbone.

Weights alone do not say which modules carry which experts, so every checkpoint stores this log and it is replayed before the
weights load. The log is append-only: a plan that was carried out is never edited.
"""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class TaskPlan:
    """What a strategy adds for one stage.

    Args:
        stage: name of the stage that the plan is for.
        ranks: module path (relative to the backbone) -> rank; only modules that get something new.
        ratios: tower -> share of the budget or learning-rate ratio.
        extra: anything else that is needed to rebuild the structure (thresholds, seeds); JSON types only.
    """

    stage: str
    ranks: dict[str, int] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class FreezeRecord:
    """What a strategy froze for ever at the end of a stage: module path -> names of the branches."""

    stage: str
    branches: dict[str, list[str]] = field(default_factory=dict)


class StructureLog:
    """Append-only list of `TaskPlan` and `FreezeRecord`."""

    def __init__(self) -> None:
        self.entries: list[TaskPlan | FreezeRecord] = []

    def append(self, entry: TaskPlan | FreezeRecord) -> None:
        """Add an entry; a stage may have one plan and one freeze record."""
        assert not any(type(e) is type(entry) and e.stage == entry.stage for e in self.entries), entry.stage
        self.entries.append(entry)

    def plan(self, stage: str) -> TaskPlan | None:
        """The plan that was carried out for a stage, if any."""
        return next((e for e in self.entries if isinstance(e, TaskPlan) and e.stage == stage), None)

    def to_list(self) -> list[dict[str, Any]]:
        """JSON form, in order."""
        return [{"kind": type(entry).__name__, **asdict(entry)} for entry in self.entries]

    @classmethod
    def from_list(cls, items: list[dict[str, Any]]) -> "StructureLog":
        """Inverse of `to_list`.

        Raises:
            ValueError: an item is of an unknown kind.
        """
        kinds: dict[str, type[TaskPlan] | type[FreezeRecord]] = {"TaskPlan": TaskPlan, "FreezeRecord": FreezeRecord}
        log = cls()
        for item in items:
            values = dict(item)
            kind = values.pop("kind", None)
            if kind not in kinds:
                raise ValueError(f"structure log: unknown entry {kind!r}; known: {', '.join(kinds)}")
            log.append(kinds[kind](**values))
        return log

    def __len__(self) -> int:
        return len(self.entries)
