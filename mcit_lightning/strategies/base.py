"""The interface that a continual-learning method implements. A new method is one file with one subclass."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from mcit_lightning.data.replay import Replay
from mcit_lightning.loss import Batch, LossOutput, answer_loss
from mcit_lightning.plans import FreezeRecord, TaskPlan
from mcit_lightning.registry import Registry
from mcit_lightning.stages import Stage, sequential_stages
from mcit_lightning.towers import Towers


@dataclass
class StrategyConfig:
    """Base of the strategies' hyper-parameters; has none of its own."""


class ContinualStrategy(nn.Module):
    """A continual-learning method: what to add for a stage, what to train, and how to route.

    A strategy decides and computes; it knows no Trainer. Lightning callbacks choose the moment (`callbacks/`), the module owns
    structure and weights (`MCITModule`). Trainable state of the strategy itself (routers, keys) is kept in submodules, so it is
    saved with the adapters. Hooks run on every rank and must be deterministic given their arguments.

    Args:
        config: an instance of the class's `Config`.
    """

    Config: ClassVar[type] = StrategyConfig
    """Dataclass with the hyper-parameters; checks ranges in `__post_init__` with ValueError."""
    uses_all_parameters: bool = True
    """Every trainable parameter gets a gradient in every step. False makes DDP look for unused ones."""
    review_batch_size: ClassVar[int | None] = None
    """Samples per batch in `review`; None for the stage's."""

    compiles: ClassVar[bool] = True
    """The decoder's layers can be compiled: no gate decides in Python, and no layer changes from batch to batch."""

    shards: ClassVar[bool] = True
    """Works where the decoder's weights are spread over processes (fsdp2): they are never read, and outside of training steps all
    processes run the decoder equally often."""

    reads_tower: bool = False
    """Reads the pretrained vision tower's output for a batch before the model does; where it is the same, it is computed once."""

    needs_base_gradients: bool = False
    """Something takes gradients of the frozen base weights, which a quantised base does not have."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.samples_examined = 0
        """Evaluated samples that a router had to look at in this process; one that it remembers is not counted again."""
        self.seed = 0  # the module sets the experiment's seed; new adapters draw their initial values from it
        self.tunes_projector = False  # the module says whether it trains the projector beside what `trainable` yields

    @classmethod
    def stages(cls, tasks: list[str]) -> list[Stage]:
        """The training stages of a task sequence; default: one per task, in order."""
        return sequential_stages(tasks)

    def required_callbacks(self) -> tuple[str, ...]:
        """Names of the callbacks without which this configuration would silently be another method.

        Default: those that call what the strategy does at the start and at the end of a task.
        """
        starts = type(self).begin_task is not ContinualStrategy.begin_task
        ends = type(self).end_task is not ContinualStrategy.end_task
        return ("TaskPreview",) * starts + ("Consolidate",) * ends

    def check(self, towers: Towers, stages: list[Stage]) -> None:
        """Look for what a plan would stumble over, before anything is evaluated; default: make the first stage's plan.

        Raises:
            ValueError: a configured target matches nothing in this model.
        """
        if stages:
            self.plan(stages[0], towers)

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """Decide what the stage adds to the model, without side effects.

        Raises:
            ValueError: a configured target matches nothing in this model.
        """
        raise NotImplementedError

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Build what the plan says. Replayed on a fresh model when a run resumes, so it depends on its arguments alone."""
        raise NotImplementedError

    def freeze(self, towers: Towers, record: FreezeRecord) -> None:
        """Carry out a freeze record; replayed like `grow`."""
        raise NotImplementedError

    def trainable(self, towers: Towers, stage: Stage) -> Iterable[nn.Parameter]:
        """Parameters that train in this stage, the projector aside; everything else is frozen. Default: all adapters."""
        for layer in towers.adapters.values():
            for _, parameter in layer.adapter_parameters():
                yield parameter
        yield from self.parameters()

    def replay(self, stage: Stage, rows: Mapping[str, int]) -> Replay:
        """Training samples of earlier tasks that the stage mixes with its own; default: none.

        Must depend on its arguments and the configuration alone: the data module asks on every rank, and again after an
        interruption.

        Args:
            rows: tasks of earlier stages, in order -> their training samples.
        """
        return Replay()

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Training loss of a batch; default: cross-entropy on the answer tokens."""
        return answer_loss(model, batch)  # type: ignore[arg-type]

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Context in which the model runs on a batch: sets the gates.

        In training the gates must stay set after the block, because activation checkpointing runs the forward again during
        the backward pass; the next call replaces them.

        Args:
            task: the stage's name in training; None in evaluation, where no task id may be used.
        """
        return nullcontext()

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """What the model takes of a batch, within the batch's `routing`; default: the batch's `inputs`, as they are.

        A strategy that puts tokens of its own into the decoder's input returns longer rows, as its `loss` uses them.
        """
        inputs: dict[str, Any] = batch["inputs"]
        return inputs

    def router_samples(self, rows: int) -> int:
        """How many of a stage's training samples `features` is to be taken of, to make the stage's router; 0 for none.

        Args:
            rows: training samples of the stage.
        """
        return 0

    def features(self, towers: Towers, batch: Batch) -> Tensor:
        """[B, d], what the router sees of each sample of a batch; needed where `router_samples` is not 0."""
        raise NotImplementedError

    def fit_router(self, stage: Stage, features: Tensor) -> dict[str, float]:
        """Make the stage's router from the features [N, d] of its samples; called once, after `grow`.

        Returns:
            What is worth logging about it.
        """
        raise NotImplementedError

    def routed_to(self) -> list[list[str]] | None:
        """Where the last evaluation batch was routed: for each sample the tasks whose experts it got, best first.

        None where the strategy does not route, or had nothing to route to.
        """
        return None

    def plain_lora(self, towers: Towers) -> dict[str, dict[str, list[str]]]:
        """What other libraries can load: adapter name -> module path -> branches that are summed with weight one.

        Default: all branches as one adapter named `adapter`, if no layer has a gate. Empty where the weights of the branches
        depend on the input.
        """
        if not towers.adapters or any(layer.gate is not None for layer in towers.adapters.values()):
            return {}
        return {"adapter": {path: list(layer.lora_b) for path, layer in towers.adapters.items()}}

    def preview_samples(self, rows: int) -> int:
        """How many of a stage's training samples `preview` is to see before its training, over all ranks; 0 for none.

        Args:
            rows: training samples of the stage.
        """
        return 0

    def preview(self, towers: Towers, batch: Batch, stage: Stage) -> None:
        """Look at a batch of the stage's training samples after `grow`; needed where `preview_samples` is not 0.

        Nothing trains, the model computes as in evaluation, and each rank has its share of the samples. Sum over ranks in
        `begin_task`.
        """
        raise NotImplementedError

    def begin_task(self, towers: Towers, stage: Stage) -> None:
        """Called once after the previews, before the stage's training; a resumed stage has its effect from the checkpoint."""

    def review_samples(self, rows: int) -> int:
        """How many of a stage's training samples `review` is to see at its end, over all ranks; 0 for none.

        Args:
            rows: training samples of the stage.
        """
        return 0

    def review(self, towers: Towers, batch: Batch, stage: Stage) -> None:
        """Look at a batch of the stage's training samples again, before `end_task`; needed where `review_samples` is not 0.

        The model computes as in evaluation, what the stage has trained still requires gradients, and each rank has its share of
        the samples. Take gradients with `torch.autograd.grad` or `adding_gradients`, which leave DDP alone, and sum over ranks in
        `end_task`.
        """
        raise NotImplementedError

    def end_task(self, towers: Towers, stage: Stage) -> FreezeRecord | None:
        """Consolidate after a stage's training, and say what freezes for ever, if anything."""
        return None


STRATEGIES: Registry[ContinualStrategy] = Registry("strategy")
