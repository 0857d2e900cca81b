"""BranchLoRA (Zhang et al., ACL 2025): one trunk A, many branches B, a router per task, and branches that freeze after use."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.gates import GateInput, GateState
from mcit_lightning.loss import Batch, LossOutput, answer_loss, prompt_mask
from mcit_lightning.plans import FreezeRecord, TaskPlan
from mcit_lightning.selector import TaskSelector, embed
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.moelora import ROUTER, MoELoRA, MoELoRAConfig, set_gates
from mcit_lightning.towers import Towers


@dataclass
class BranchLoRAConfig(MoELoRAConfig):
    """The method's parts can be switched off one by one, which gives the paper's ablation down to MoELoRA."""

    shared_trunk: bool = True
    """One A per module for all branches; False gives every branch its own."""
    top_k: int | None = 2
    """Branches per sample; null mixes all of them."""
    gate_input: GateInput = "first"
    """What the router reads. In a causal decoder the `first` token's state does not depend on the sample: the gate is then
    constant per task and module. `mean` (over the prompt) and `token` route by content."""
    normalize_gate_input: bool = True
    """Divide the router's input by its root mean square; the first token's activations are extreme."""
    router_noise: float = 0.7
    """Standard deviation of the noise on the logits in training; without it the choice stays where it was initialised."""
    freeze_branches: bool = True
    """After a task, freeze the branches of each module that it used most."""
    freeze_count: int | None = None
    """How many freeze per task and module; null: top_k."""
    freeze_only_tunable: bool = False
    """Choose among branches that are not frozen yet; by default an already frozen one may be chosen again."""
    freeze_trunk_after: int | None = None
    """Freeze A after that many tasks; null: it trains on."""
    task_routers: bool = True
    """A router per task, and a selector that finds it at evaluation; False: one router for all tasks."""
    selector: Literal["keys", "learned_keys", "oracle"] = "keys"
    """How a sample's task is found: keys that are means of unit embeddings, keys trained by the alignment loss, or the true task
    (to tell routing errors from weight drift)."""
    alignment_weight: float = 1.0
    """lambda of the alignment loss, for learned keys."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k: is {self.top_k}, must be between 1 and experts ({self.experts}), or null for all")
        if self.top_k == 1:
            raise ValueError(
                "top_k: with 1 the softmax over the chosen branch is always 1 and the router gets no gradient; use 2"
            )
        if self.router_noise < 0:
            raise ValueError(f"router_noise: is {self.router_noise}, must not be negative")
        if self.freeze_branches and self.top_k is None and self.freeze_count is None:
            raise ValueError("freeze_count: is needed when top_k is null and freeze_branches is true")
        if set(self.targets) - {"language"}:
            raise ValueError(f"targets: BranchLoRA routes tokens of the language model; got {sorted(self.targets)}")


@STRATEGIES.register("branchlora")
class BranchLoRA(MoELoRA):
    """A trunk A and N branches B of rank r / N per module; task-specific routers pick the top-k branches.

        y = W0 x + (alpha / r) sum_{i in S_t} g_i B_i A x,    g, S_t = softmax over the top k of R_t z

    z is the layer's input at the first real token. Routers are spawned per task (`callbacks.RouterSpawn`), the most used branches
    freeze after a task (`callbacks.BranchFreeze`) but stay selectable, and a task selector finds the router at evaluation.
    """

    Config = BranchLoRAConfig
    config: BranchLoRAConfig

    def __init__(self, config: BranchLoRAConfig) -> None:
        super().__init__(config)
        self.top_k, self.gate_input, self.normalize = config.top_k, config.gate_input, config.normalize_gate_input
        self.selector = TaskSelector(learned=config.selector == "learned_keys")
        self.frozen: dict[str, set[str]] = {}
        self._steps = 0
        self._choice: Tensor | None = None
        self._embedded: tuple[Tensor, Tensor, Tensor] | None = None

    def get_extra_state(self) -> Tensor:
        """Number of batches that got noise; kept beside the weights, and on the CPU, where it is needed."""
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue to count where the checkpoint stopped."""
        self._steps = int(state)

    def required_callbacks(self) -> tuple[str, ...]:
        """`BranchFreeze`, where branches are to freeze."""
        return ("BranchFreeze",) if self.config.freeze_branches else ()

    def trunk(self, index: int) -> str:
        """The shared trunk, or a branch's own A."""
        return "trunk" if self.config.shared_trunk else super().trunk(index)

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """All branches in the first stage; with task routers, a router for the stage in every module."""
        plan = super().plan(stage, towers)
        router = stage.name if self.config.task_routers else ROUTER
        return TaskPlan(stage.name, ranks=plan.ranks, extra={"router": router})

    def add_routers(self, towers: Towers, plan: TaskPlan) -> None:
        """The planned router in every module, and the task's keys."""
        router = plan.extra["router"]
        for path, layer in towers.adapters.items():
            layer.add_router(router, seed=self.seed, path=path)
        if self.config.task_routers:
            config = towers.model.config
            width = config.vision_config.hidden_size, config.get_text_config().hidden_size
            self.selector.add_task(router, *width, towers.model.device)

    def trainable(self, towers: Towers, stage: Stage) -> Iterator[nn.Parameter]:
        """The trunk (unless its time is over), branches that are not frozen, the stage's routers, and learned keys."""
        after = self.config.freeze_trunk_after
        router = stage.name if self.config.task_routers else ROUTER
        for path, layer in towers.adapters.items():
            if after is None or stage.index < after:
                yield from layer.lora_a.values()
            yield from (b for name, b in layer.lora_b.items() if name not in self.frozen.get(path, ()))
            yield layer.routers[router]
        if self.selector.learned:
            yield self.selector.image_keys[router]
            yield self.selector.text_keys[router]

    def freeze(self, towers: Towers, record: FreezeRecord) -> None:
        """Add to each module's frozen branches; they stay selectable."""
        for path, names in record.branches.items():
            self.frozen.setdefault(path, set()).update(names)

    def usage(self) -> Tensor:
        """[modules, 2, E] of the last training batch: how often each branch was chosen, and the sum of its gates."""
        assert self.state is not None
        return torch.stack(list(self.state.usage.values()))

    def most_used(self, layers: dict[str, AdapterLinear], count: Tensor, mass: Tensor) -> dict[str, list[str]]:
        """Branches to freeze after a task, per module.

        Args:
            layers: module path -> layer, in the order of the rows.
            count: [modules, E], how often each branch was among the chosen.
            mass: [modules, E], sum of its gates; decides between equal counts, then the lower index.
        """
        number = self.config.freeze_count or self.config.top_k
        assert number is not None
        chosen: dict[str, list[str]] = {}
        for row, (path, layer) in enumerate(layers.items()):
            names = list(layer.lora_b)
            old = self.frozen.get(path, set()) if self.config.freeze_only_tunable else set()
            rank = sorted((-count[row, e].item(), -mass[row, e].item(), e) for e in range(len(names)))
            chosen[path] = [names[e] for used, _, e in rank if used < 0 and names[e] not in old][:number]
        return chosen

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Cross-entropy, with lambda times the alignment loss of the stage's keys where they are learned."""
        output = answer_loss(model, batch)  # type: ignore[arg-type]
        if self.selector.learned and self.config.task_routers:
            assert self._embedded is not None
            alignment = self.selector.alignment_loss(stage.name, *self._embedded)
            output.loss = output.loss + self.config.alignment_weight * alignment
            output.parts["alignment"] = alignment
        return output

    def gate_state(self, towers: Towers, batch: Batch, task: str | None) -> GateState:
        """The stage's router in training; at evaluation the one that the selector finds for each sample."""
        if task is not None:
            router = task if self.config.task_routers else ROUTER
            state = GateState(mask=prompt_mask(batch), router=router)
            if self.training and self.config.task_routers and self.config.selector != "oracle":
                self._embedded = embed(towers, batch)
                if not self.selector.learned:
                    self.selector.update(task, *self._embedded)
            if self.training and self.config.router_noise > 0 and self.gate_input != "token":
                state.noise = self._noise(towers, len(batch["id"]))
            return state
        state = GateState(mask=prompt_mask(batch), router=ROUTER, generating=True)
        self._choice = None
        if self.config.task_routers and towers.adapters:
            self._choice = self._choose(towers, batch)
            state.choice = self._choice
        return state

    def routed_to(self) -> list[list[str]] | None:
        """The task whose router each sample of the last evaluation batch got."""
        if self._choice is None:
            return None
        return [[self.selector.tasks[index]] for index in self._choice.tolist()]

    @contextmanager
    def merged(self, towers: Towers, batch: Batch, task: str) -> Iterator[None]:
        """Context in which a learnt task's branches are part of the base weights: same answers, no adapter cost.

        With the first-token gate and no noise the gate is a constant of task and module. Inside, every sample is answered
        with that task's router; no routing context is needed.

        Args:
            batch: any batch whose prompts start with the template's first token; its first row is run once to read the gates.
            task: a learnt task.

        Raises:
            ValueError: the gate depends on the sample, or the task has no router.
        """
        if self.gate_input != "first":
            raise ValueError(
                f"gate_input: is {self.gate_input!r}; only the gate of the first token is constant and can be merged"
            )
        router = task if self.config.task_routers else ROUTER
        layers = towers.adapters
        if not layers or router not in next(iter(layers.values())).routers:
            raise ValueError(f"task {task!r} has no router; learnt: {', '.join(self.selector.tasks) or 'none'}")
        self.state = GateState(mask=prompt_mask(batch), router=router, generating=True)
        set_gates(towers, self.state)
        with torch.no_grad():
            towers.model(**batch["inputs"])
        gates = {path: gate[0] for path, gate in self.state.decided.items()}
        try:
            for path, layer in layers.items():
                layer.merge(gates[path])
            yield
        finally:
            for layer in layers.values():
                layer.unmerge()

    def _choose(self, towers: Towers, batch: Batch) -> Tensor:
        """[B], index of each sample's router. The oracle sends a task that was not learnt yet to the newest router."""
        tasks = self.selector.tasks
        if self.config.selector == "oracle":
            index = [tasks.index(task) if task in tasks else len(tasks) - 1 for task in batch["task"]]
            return torch.tensor(index, device=batch["inputs"]["input_ids"].device)
        return self.selector.scores(*embed(towers, batch)).argmax(1)

    def _noise(self, towers: Towers, size: int) -> dict[str, Tensor]:
        """[B, E] per module, drawn from (seed, rank, step): a resumed run and a recomputed forward see the same."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{rank}/{self._steps}".encode()))
        self._steps += 1
        paths = list(towers.adapters)
        draws = torch.randn(len(paths), size, self.config.experts, generator=generator) * self.config.router_noise
        return dict(zip(paths, draws.to(towers.model.device, non_blocking=True), strict=True))
