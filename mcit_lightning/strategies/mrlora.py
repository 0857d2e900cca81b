"""MR-LoRA (Zhao et al. 2025, arXiv 2506.05453): a LoRA per task, and a router LoRA that answers the question “which expert?”."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcit_lightning.config import TaskConfig
from mcit_lightning.data.encode import Encoder
from mcit_lightning.data.records import LETTERS
from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.expert_question import PLACEHOLDERS, TEMPLATE, ExpertQuestion, ExpertQuestionReader
from mcit_lightning.generation import generate_tokens
from mcit_lightning.loss import Batch
from mcit_lightning.plans import TaskPlan
from mcit_lightning.routes import SampleGate
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.strategies.task_lora import TaskLoRA
from mcit_lightning.task_projectors import TaskProjectors
from mcit_lightning.tiles import tile_owners
from mcit_lightning.towers import Towers
from mcit_lightning.tuning import TuningRecipe

ROUTER = "+router"
"""Name of the router's branch; no task has a name like that."""
PRETRAINED = "+pretrained"
"""Name of the pretrained projector, which the router sees pictures through."""


@dataclass
class MRLoRAConfig(LoRAConfig):
    """The router is trained as in the release for LLaVA in MCITlib; the experts as `optim` and `tasks` say."""

    descriptions: dict[str, str] = field(default_factory=dict)
    """Task -> what its expert is good at, as the router is told. A task without an entry is described by its longest name or
    alias: `rs` with the alias `remote_sensing` is “An expert in remote sensing.”"""
    question: str | None = None
    """Text of the question, with `{experts}`, `{question}` and `{letters}` in it; null takes `expert_question.TEMPLATE`."""
    router_samples: int = 20
    """Training samples of each task that the router learns from, drawn by the seed."""
    router_epochs: int = 30
    """Passes over the samples of all tasks."""
    router_lr: float = 2.0e-4
    """Highest learning rate of the router; its warm-up and cosine are its own."""
    router_batch_size: int = 16
    """Samples per step of the router, over all processes."""
    router_warmup_ratio: float = 0.03
    """Share of the router's steps in which its rate rises."""
    router_max_new_tokens: int = 16
    """Longest answer of the router, in tokens; more than a letter and one other character names no expert."""
    projector: Literal["per_task", "shared"] = "per_task"
    """Where the projector trains: `per_task` trains each task's from the pretrained one and keeps it for the task's samples, as
    the release does; `shared` trains one through all tasks, and experts then answer through a projector that has moved on."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("router_samples", "router_epochs", "router_batch_size", "router_max_new_tokens"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: is {getattr(self, key)}, must be at least 1")
        if not 0 < self.router_lr < float("inf"):
            raise ValueError(f"router_lr: is {self.router_lr}, must be a finite number greater than 0")
        if not 0 <= self.router_warmup_ratio <= 1:
            raise ValueError(f"router_warmup_ratio: is {self.router_warmup_ratio}, must be in [0, 1]")
        for placeholder in PLACEHOLDERS[:2]:
            if self.question is not None and placeholder not in self.question:
                raise ValueError(f"question: does not contain {placeholder}, in whose place the router is told of it")


@STRATEGIES.register("mrlora")
class MRLoRA(TaskLoRA):
    """Training: the task's own LoRA, from its own start. Evaluation, for a sample x:

        y = W0 x + s B_k A_k x,    k = the expert whose letter W0 + s B_r A_r answers to the question “which expert?” about x

    After every task but the first, the router (B_r, A_r) starts anew and learns to answer that question about a few samples of
    all tasks so far, with the next-token loss. An answer that names no expert sends the sample to one of them at random, as in
    the released code; here the draw depends on the sample's id and the seed alone. With one task there is nothing to ask.

    Written after the authors' code and their release in MCITlib. It differs where that code lists all experts of the benchmark
    from the first task on: here only those learnt so far are. Left out: that the router tunes a projector of its own (it sees
    pictures through the pretrained one) and has dropout, and the start of the first release's router for domains at the mean of
    the experts, which the later releases do without.
    """

    Config = MRLoRAConfig
    config: MRLoRAConfig
    compiles = False

    def __init__(self, config: MRLoRAConfig) -> None:
        super().__init__(config)
        self.tasks: list[str] = []
        self.projectors = TaskProjectors() if config.projector == "per_task" else None
        self._encoder: Encoder | None = None
        self._descriptions: dict[str, str] = {}
        self._choice: list[int] | None = None

    def required_callbacks(self) -> tuple[str, ...]:
        """What trains the router."""
        return ("RouterTuning",)

    # ------------------------------------------------------------------------------------------------------------- experts

    def check(self, towers: Towers, stages: list[Stage]) -> None:
        """Look for the targets, and whether every expert gets a letter. Raises ValueError where one of them is not so."""
        super().check(towers, stages)
        if len(stages) > len(LETTERS):
            raise ValueError(
                f"strategy: mrlora names experts by a letter, and there are {len(LETTERS)}; `order` has {len(stages)} tasks"
            )

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The stage's expert and, with the first one, the router. The projector starts from the pretrained one again."""
        super().grow(towers, plan)
        for path, rank in plan.ranks.items():
            towers.adapters[path].add_branch(ROUTER, rank, seed=self.seed, path=path)
        if plan.stage in self.tasks:
            return
        if self._keeps_projectors:
            assert self.projectors is not None
            self.projectors.keep(self.tasks[-1] if self.tasks else PRETRAINED, towers)
            self.projectors.restore(PRETRAINED, towers)
        self.tasks.append(plan.stage)

    def plain_lora(self, towers: Towers) -> dict[str, dict[str, list[str]]]:
        """Each task's expert as an adapter of the task's name; none where every expert has a projector of its own."""
        if self._keeps_projectors:
            return {}
        return {task: {path: [task] for path in towers.adapters} for task in self.tasks}

    @property
    def _keeps_projectors(self) -> bool:
        return self.projectors is not None and self.tunes_projector

    # -------------------------------------------------------------------------------------------------------------- router

    def use_prompts(self, encoder: Encoder, tasks: Mapping[str, TaskConfig]) -> None:
        """See `AsksItself`.

        Raises:
            ValueError: a description is of an unknown task.
        """
        if unknown := sorted(set(self.config.descriptions) - set(tasks)):
            raise ValueError(
                f"strategy.descriptions: no task {', '.join(unknown)}; the experiment has {', '.join(tasks)}"
            )
        self._encoder = encoder
        for name, task in tasks.items():
            words = max((name, *task.aliases), key=len).replace("_", " ").replace("-", " ")
            self._descriptions[name] = self.config.descriptions.get(name, f"An expert in {words}.")

    def expert_question(self) -> ExpertQuestion:
        """The question about the tasks learnt so far."""
        experts = tuple((task, self._descriptions[task]) for task in self.tasks)
        return ExpertQuestion(experts, self.config.question or TEMPLATE)

    def sample_reader(self) -> ExpertQuestionReader | None:
        """What adds the question to evaluation batches, if there is something to choose."""
        if len(self.tasks) < 2:
            return None
        assert self._encoder is not None, "the module calls `use_prompts`"
        return ExpertQuestionReader(self._encoder, self.expert_question())

    def recipe(self, stage: Stage) -> TuningRecipe:
        """How the router is trained after a stage."""
        config = self.config
        seed = derive_seed(self.seed, "router", stage.name)
        return TuningRecipe(
            config.router_epochs, config.router_lr, config.router_batch_size, config.router_warmup_ratio, seed
        )

    def new_router(self, towers: Towers) -> list[nn.Parameter]:
        """Bring the router back to its start; returns what trains."""
        for path, layer in towers.adapters.items():
            layer.reset_branch(ROUTER, seed=self.seed, path=path)
        return [table[ROUTER] for layer in towers.adapters.values() for table in (layer.lora_a, layer.lora_b)]

    @contextmanager
    def as_router(self, towers: Towers, batch: Batch) -> Iterator[None]:
        """Context in which the model is the router, for a batch of any prompts."""
        size = len(batch["id"])
        self._select(towers, batch, [ROUTER], torch.zeros(size, dtype=torch.long, device=towers.model.device))
        with self._through_projectors(towers, batch, torch.full((size,), -1, device=towers.model.device)):
            yield

    @torch.no_grad()
    def _ask(self, towers: Towers, batch: Batch) -> list[int]:
        """The expert of each sample, an index into `tasks`."""
        if len(self.tasks) == 1:
            return [0] * len(batch["id"])
        assert self._encoder is not None and "strategy_inputs" in batch, "the data module asks for `sample_reader`"
        inputs = {**batch["inputs"], **batch["strategy_inputs"]}
        with self.as_router(towers, batch), towers.generating():
            tokens = generate_tokens(
                towers.model, inputs, self.config.router_max_new_tokens, self._encoder.end_id, lockstep=towers.sharded
            )
        question, chosen = self.expert_question(), []
        for name, answer in zip(
            batch["id"], self._encoder.tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True
        ):
            expert = question.chosen(answer)
            by_lot = derive_seed(self.seed, "no expert", name) % len(self.tasks)
            chosen.append(by_lot if expert is None else expert)
        self.samples_examined += len(chosen)
        return chosen

    # ------------------------------------------------------------------------------------------------------------- routing

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Training: the stage's expert. Evaluation: each sample's, after the router was asked. Raises as `tile_owners`."""
        self._choice = None
        if not self.tasks:
            if self._keeps_projectors:
                tile_owners(towers, batch)  # a model whose pictures have no single owner raises before any training
            return nullcontext()
        if task is not None:
            own = torch.zeros(len(batch["id"]), dtype=torch.long, device=batch["inputs"]["input_ids"].device)
            self._select(towers, batch, [task], own)
            return nullcontext()
        self._choice = self._ask(towers, batch)
        used = sorted(set(self._choice))
        choice = torch.tensor(self._choice, device=batch["inputs"]["input_ids"].device)
        places = torch.tensor([used.index(expert) for expert in self._choice], device=choice.device)
        self._select(towers, batch, [self.tasks[expert] for expert in used], places)
        return self._through_projectors(towers, batch, choice)

    def routed_to(self) -> list[list[str]] | None:
        """The one task whose expert each sample of the last evaluation batch got."""
        return None if self._choice is None else [[self.tasks[expert]] for expert in self._choice]

    def _select(self, towers: Towers, batch: Batch, names: list[str], choice: Tensor) -> None:
        """Let only these branches take part, and give each sample the one that it has chosen.

        Args:
            choice: [B], indices into `names`.
        """
        gates: dict[str, SampleGate] = {}
        if len(names) > 1:
            rows = {"language": choice}
            if self.config.targets.get("vision"):
                rows["vision"] = choice.index_select(0, tile_owners(towers, batch))
            for tower, own in rows.items():
                gates[tower] = SampleGate()
                gates[tower].value = F.one_hot(own, len(names)).float()
        for path, layer in towers.adapters.items():
            layer.use(names)
            layer.gate = gates[towers.tower_of(path) or "language"] if gates else None

    @contextmanager
    def _through_projectors(self, towers: Towers, batch: Batch, choice: Tensor) -> Iterator[None]:
        """Context in which each picture goes through the projector of its sample's expert.

        Args:
            choice: [B], indices into `tasks`; -1 for the pretrained projector, which is kept before those.
        """
        if not self._keeps_projectors:
            yield
            return
        assert self.projectors is not None
        self.projectors.choose((choice + 1).index_select(0, tile_owners(towers, batch)))
        try:
            yield
        finally:
            self.projectors.choose(None)
