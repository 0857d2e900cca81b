"""BranchLoRA (Zhang et al., ACL 2025): one trunk A, many branches B, a router per task, and branches that freeze after use."""

import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.gates import GateState
from mcit_lightning.key_encoders import Embeddings
from mcit_lightning.loss import Batch, LossOutput, answer_loss, prompt_mask
from mcit_lightning.plans import FreezeRecord, TaskPlan
from mcit_lightning.selector import TaskSelector
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.branchlora_config import BranchLoRAConfig
from mcit_lightning.strategies.key_encoded import KeyEncoded
from mcit_lightning.strategies.moelora import INIT_STD, ROUTER, MoELoRA, set_gates
from mcit_lightning.task_projectors import TaskProjectors
from mcit_lightning.tiles import image_tokens, tile_owners
from mcit_lightning.towers import Towers


@STRATEGIES.register("branchlora")
class BranchLoRA(KeyEncoded, MoELoRA):
    """A trunk A and N branches B of rank r / N per module; task-specific routers pick the top-k branches.

        y = W0 x + (alpha / r) sum_{i in S_t} g_i B_i A x,    g, S_t = softmax over the top k of R_t z

    z is the layer's input at the first real token. Routers are spawned per task (`callbacks.RouterSpawn`), the most used branches
    freeze after a task (`callbacks.BranchFreeze`) but stay selectable, and a task selector finds the router at evaluation.
    """

    Config = BranchLoRAConfig
    config: BranchLoRAConfig

    def __init__(self, config: BranchLoRAConfig) -> None:
        super().__init__(config)
        self.top_k, self.renormalize = config.top_k, config.renormalize_top_k
        self.gate_input, self.normalize = config.gate_input, config.normalize_gate_input
        self.selector = TaskSelector(learned=config.selector == "learned_keys")
        self.projectors = TaskProjectors() if config.projector == "per_task" else None
        self.frozen: dict[str, set[str]] = {}
        self._steps = 0
        self._choice: Tensor | None = None
        self._found: Tensor | None = None
        self._embedded: Embeddings | None = None

    def get_extra_state(self) -> Tensor:
        """Number of batches that got noise; kept beside the weights, and on the CPU, where it is needed."""
        return torch.tensor(self._steps)

    def set_extra_state(self, state: Tensor) -> None:
        """Continue to count where the checkpoint stopped."""
        self._steps = int(state)

    def required_callbacks(self) -> tuple[str, ...]:
        """`BranchFreeze`, where branches are to freeze."""
        return ("BranchFreeze",) if self.config.freeze_branches else ()

    @property
    def uses_keys(self) -> bool:
        """Whether a sample's task is found by keys."""
        return self.config.task_routers and self.config.selector != "oracle"

    @property
    def reads_tower(self) -> bool:  # type: ignore[override]
        """Whether keys are compared with the vision tower's output."""
        return self.uses_keys and super().reads_tower

    @property
    def rank(self) -> int:
        """Inner rank of the trunk and of every branch."""
        return self.config.branch_rank or self.config.rank // self.config.experts

    @property
    def scale(self) -> float:
        """alpha / r, or alpha over the inner rank."""
        return self.config.alpha / (self.config.rank if self.config.scale_by == "rank" else self.rank)

    def add_experts(self, layer: AdapterLinear, path: str) -> None:
        """The branches of one module, with a shared trunk or an A each. Every B can freeze alone."""
        self._add(layer, path, self.config.experts - len(layer.lora_b))  # none where the plan was carried out before

    def _add(self, layer: AdapterLinear, path: str, number: int) -> None:
        trunk, there = "trunk" if self.config.shared_trunk else None, len(layer.lora_b)
        for index in range(there, there + number):
            layer.add_branch(f"expert{index}", self.rank, seed=self.seed, path=path, trunk=trunk, std=INIT_STD)

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """All branches in the first stage; with task routers, a router for the stage in every module.

        Later, `grow_exhausted` branches where all are frozen.
        """
        ranks = dict.fromkeys(super().plan(stage, towers).ranks, self.rank * self.config.experts)
        router = stage.name if self.config.task_routers else ROUTER
        extra: dict[str, Any] = {"router": router}
        if self.config.grow_exhausted:
            extra["more"] = dict.fromkeys(self.exhausted(towers), self.config.grow_exhausted)
        return TaskPlan(stage.name, ranks=ranks, extra=extra)

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Attach the planned branches and routers. A plan that was carried out adds nothing."""
        for path, number in plan.extra.get("more", {}).items():
            layer = towers.adapters[path]
            if plan.extra["router"] not in layer.routers:
                self._add(layer, path, number)
        super().grow(towers, plan)

    def add_routers(self, towers: Towers, plan: TaskPlan) -> None:
        """The planned router in every module, and the task's keys."""
        router = plan.extra["router"]
        for path, layer in towers.adapters.items():
            before = list(layer.routers.values())
            is_new = router not in layer.routers
            layer.add_router(router, seed=self.seed, path=path)
            if is_new and self.config.router_init == "zeros":
                nn.init.zeros_(layer.routers[router])
            elif is_new and before and self.config.router_init == "previous":
                layer.routers[router].data[: len(before[-1])] = before[-1].data  # rows of new branches stay drawn
        if self.projectors is not None and self.selector.tasks and router not in self.selector.tasks:
            self.projectors.keep(self.selector.tasks[-1], towers)
        if self.config.task_routers:
            self.selector.add_task(router, *self.key_encoder().widths(towers), towers.model.device)

    def trainable(self, towers: Towers, stage: Stage) -> Iterator[nn.Parameter]:
        """The trunk (unless its time is over), branches that are not frozen, the stage's routers, and learned keys.

        A branch that owns its A freezes as a whole.
        """
        after = self.config.freeze_trunk_after
        router = stage.name if self.config.task_routers else ROUTER
        for path, layer in towers.adapters.items():
            frozen = self.frozen.get(path, set())
            if after is None or stage.index < after:
                yield from (a for name, a in layer.lora_a.items() if name not in frozen)
            yield from (b for name, b in layer.lora_b.items() if name not in frozen)
            yield layer.routers[router]
        if self.selector.learned:
            yield self.selector.image_keys[router]
            yield self.selector.text_keys[router]

    def freeze(self, towers: Towers, record: FreezeRecord) -> None:
        """Add to each module's frozen branches; they stay selectable."""
        for path, names in record.branches.items():
            self.frozen.setdefault(path, set()).update(names)

    def exhausted(self, towers: Towers) -> list[str]:
        """Modules in which every branch is frozen."""
        return [path for path, layer in towers.adapters.items() if self.frozen.get(path, set()) >= set(layer.lora_b)]

    def usage(self, layers: dict[str, AdapterLinear]) -> Tensor:
        """[modules, 2, E] of the last training batch: how often each branch was chosen, and the sum of its gates.

        Args:
            layers: module path -> layer, in the order of the rows. Modules are called in another order than they are listed in
                by some models, and a module that was not called has zeros.
        """
        assert self.state is not None and self.state.used
        rows = torch.zeros(
            len(layers), 2, max(layer.num_gates for layer in layers.values()), device=self.state.mask.device
        )
        for row, path in enumerate(layers):
            if path in self.state.used:
                usage = self.state.usage(path)
                rows[row, :, : usage.shape[1]] = usage
        return rows

    def most_used(self, layers: dict[str, AdapterLinear], count: Tensor, mass: Tensor) -> dict[str, list[str]]:
        """Branches to freeze after a task, per module.

        Args:
            layers: module path -> layer, in the order of the rows.
            count: [modules, E], how often each branch was among the chosen.
            mass: [modules, E], sum of its gates. `freeze_by` says which of the two counts; the other decides between equals,
                then the lower index.
        """
        number = self.config.freeze_count or self.config.top_k
        assert number is not None
        first, second = (count, mass) if self.config.freeze_by == "count" else (mass, count)
        chosen: dict[str, list[str]] = {}
        for row, (path, layer) in enumerate(layers.items()):
            names = list(layer.lora_b)
            old = self.frozen.get(path, set()) if self.config.freeze_only_tunable else set()
            rank = sorted((-first[row, e].item(), -second[row, e].item(), e) for e in range(len(names)))
            chosen[path] = [names[e] for used, _, e in rank if used < 0 and names[e] not in old][:number]
        return chosen

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Cross-entropy, with lambda times the alignment loss of the stage's keys where they are learned."""
        output = answer_loss(model, batch)  # type: ignore[arg-type]
        if self.selector.learned:
            assert self._embedded is not None
            alignment = self.selector.alignment_loss(stage.name, *self._embedded)
            output.loss = output.loss + self.config.alignment_weight * alignment
            output.parts["alignment"] = alignment
        return output

    def gate_state(self, towers: Towers, batch: Batch, task: str | None) -> GateState:
        """The stage's router in training; at evaluation the one that the selector finds for each sample."""
        if task is not None:
            router = task if self.config.task_routers else ROUTER
            counting = self.training and self.config.freeze_branches
            state = GateState(mask=prompt_mask(batch), router=router, counting=counting)
            if self.uses_keys and (self.training or self.selector.learned):
                self._embedded = self.key_encoder().embed(towers, batch)
                if not self.selector.learned:
                    self.selector.update(task, *self._embedded)
            if self.training and self.config.router_noise > 0:
                state.noise = self._noise(towers, len(batch["id"]))
            return state
        state = GateState(mask=prompt_mask(batch), router=ROUTER, generating=True)
        self._choice = self._found = None
        if self.config.task_routers and towers.adapters:
            self._choice, self._found = self._choose(towers, batch)
            state.choice, state.active = self._choice, self._found
        elif self.uses_keys:  # before any training: what the first training step would stumble over
            self.key_encoder().check(towers, batch)
        return state

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Give every gate the state of this batch, and at evaluation every picture the projector of its sample's task."""
        context = super().routing(towers, batch, task)
        if self.projectors is None:
            return context
        owners = tile_owners(towers, batch)  # before any training too: raises where pictures have no single owner
        choose = task is None and self._choice is not None
        self.projectors.choose(self._choice.index_select(0, owners) if choose and self._choice is not None else None)
        return self._own_projectors(context)

    @contextmanager
    def _own_projectors(self, context: AbstractContextManager[None]) -> Iterator[None]:
        try:
            with context:
                yield
        finally:
            assert self.projectors is not None
            self.projectors.choose(None)

    def routed_to(self) -> list[list[str]] | None:
        """The task whose router each sample of the last evaluation batch got; none where no key was similar enough."""
        if self._choice is None:
            return None
        found = [True] * len(self._choice) if self._found is None else (self._found > 0).tolist()
        tasks = self.selector.tasks
        return [[tasks[index]] if known else [] for index, known in zip(self._choice.tolist(), found, strict=True)]

    def fixed_gates(self, towers: Towers, batch: Batch, task: str) -> dict[str, Tensor]:
        """Module path -> a learnt task's weight of each branch, [E], where it is the same for every input.

        Arguments and what is raised: see `merged`.
        """
        if self.gate_input != "first":
            raise ValueError(
                f"gate_input: is {self.gate_input!r}; only the gate of the first token is constant and can be merged"
            )
        router = task if self.config.task_routers else ROUTER
        layers = towers.adapters
        if not layers or router not in next(iter(layers.values())).routers:
            raise ValueError(f"task {task!r} has no router; learnt: {', '.join(self.selector.tasks) or 'none'}")
        if self.projectors is not None:
            raise ValueError(
                "projector: 'per_task' keeps a projector for each task, which merging does not switch; use shared"
            )
        if towers.model.training:
            raise ValueError("the model is in training mode, where dropout and noise vary the gate; call eval() first")
        mask = prompt_mask(batch)
        if image_tokens(towers, batch)[torch.arange(len(mask), device=mask.device), mask.argmax(1)].any():
            raise ValueError(
                "the prompts start with an image, so the gate of the first token depends on the sample and cannot be merged; "
                "use a prompt.template that starts with text"
            )
        self.state = GateState(mask=mask, router=router, generating=True)
        set_gates(towers, self.state)
        with torch.no_grad():
            towers.model(**batch["inputs"])
        gates = {path: gate[0] for path, gate in self.state.decided.items()}
        self.state.decided.clear()
        if gates.keys() != layers.keys():  # a merged layer does not ask its gate
            raise ValueError("the branches are merged already; leave the other context first")
        return gates

    @contextmanager
    def merged(self, towers: Towers, batch: Batch, task: str) -> Iterator[None]:
        """Context in which a learnt task's branches are part of the base weights: same answers, no adapter cost.

        With the first-token gate and no noise the gate is a constant of task and module. Inside, every sample is answered
        with that task's router; no routing context is needed.

        Args:
            batch: any batch whose prompts start with the template's first token; it is run once to read the gates.
            task: a learnt task.

        Raises:
            ValueError: the gate depends on the sample, the task has no router, or the layers are merged already or quantised.
        """
        gates = self.fixed_gates(towers, batch, task)
        merged: list[AdapterLinear] = []
        try:
            for path, layer in towers.adapters.items():
                layer.merge(gates[path])
                merged.append(layer)
            yield
        finally:
            for layer in merged:
                layer.unmerge()

    def _choose(self, towers: Towers, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """`TaskSelector.choose` for a batch. The oracle sends a task that was not learnt yet to the newest router."""
        tasks = self.selector.tasks
        if self.config.selector == "oracle":
            true = [tasks.index(task) if task in tasks else len(tasks) - 1 for task in batch["task"]]
            return torch.tensor(true, device=batch["inputs"]["input_ids"].device), None
        found = self.key_encoder().embed(towers, batch)
        index, known = self.selector.choose(*found, min_similarity=self.config.min_similarity)
        if self.config.route_scope == "batch_vote":
            index = torch.bincount(index, minlength=len(tasks)).argmax().expand(len(index))
        return index, known

    def _noise(self, towers: Towers, size: int) -> dict[str, Tensor]:
        """[B, E] per module, drawn from (seed, rank, step): a resumed run and a recomputed forward see the same."""
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{rank}/{self._steps}".encode()))
        self._steps += 1
        layers = towers.adapters
        width = max(layer.num_gates for layer in layers.values())
        draws = torch.randn(len(layers), size, width, generator=generator) * self.config.router_noise
        draws = draws.to(towers.model.device, non_blocking=True)
        return {path: draws[row, :, : layer.num_gates] for row, (path, layer) in enumerate(layers.items())}
