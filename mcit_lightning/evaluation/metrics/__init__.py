"""How an answer is scored: one small class per metric, looked up by the name that a task's `metric` key gives.

A new metric is a subclass of `AnswerMetric` with a `score` method and a line `@METRICS.register("name")`.
"""

from mcit_lightning.evaluation.metrics.base import METRICS as METRICS
from mcit_lightning.evaluation.metrics.base import AnswerMetric as AnswerMetric
from mcit_lightning.evaluation.metrics.base import Mode as Mode
from mcit_lightning.evaluation.metrics.base import build_metric as build_metric
from mcit_lightning.evaluation.metrics.base import check_metric as check_metric
from mcit_lightning.evaluation.metrics.base import get_metric as get_metric
from mcit_lightning.evaluation.metrics.base import task_metric as task_metric
from mcit_lightning.evaluation.metrics.boxes import box_iou as box_iou
from mcit_lightning.evaluation.metrics.boxes import parse_box as parse_box
from mcit_lightning.evaluation.metrics.caption import CaptionMetric as CaptionMetric
from mcit_lightning.evaluation.metrics.contain import Contains as Contains
from mcit_lightning.evaluation.metrics.exact import ExactMatch as ExactMatch
from mcit_lightning.evaluation.metrics.judged import JudgeScore as JudgeScore
from mcit_lightning.evaluation.metrics.options import option_letter as option_letter
from mcit_lightning.evaluation.metrics.vqa import VqaSoft as VqaSoft
