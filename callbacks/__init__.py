"""Lightning callbacks that carry out the task boundaries; list them in an experiment's `callbacks`."""

from callbacks.base import TaskCallback
from callbacks.budget import BudgetReallocation
from callbacks.checkpoint import StageCheckpoint
from callbacks.consolidate import Consolidate
from callbacks.cost import StageCost
from callbacks.curriculum import CurriculumRatio
from callbacks.freezing import BranchFreeze
from callbacks.preview import TaskPreview
from callbacks.probe import GradientProbe
from callbacks.progress import StageProgress
from callbacks.routers import RouterSpawn
from callbacks.transfer import BackwardTransfer
from callbacks.tuning import RouterTuning

__all__ = [
    "BackwardTransfer",
    "BranchFreeze",
    "BudgetReallocation",
    "Consolidate",
    "CurriculumRatio",
    "GradientProbe",
    "RouterSpawn",
    "RouterTuning",
    "StageCheckpoint",
    "StageCost",
    "StageProgress",
    "TaskCallback",
    "TaskPreview",
]
