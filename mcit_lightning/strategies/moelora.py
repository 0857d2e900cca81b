"""MoELoRA, the method of CoIN (Chen et al., NeurIPS 2024): LoRA experts with a dense softmax router per token."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.gates import GateInput, GateState, RouterGate
from mcit_lightning.loss import Batch, prompt_mask
from mcit_lightning.plans import TaskPlan
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES, ContinualStrategy
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.towers import Towers, find_targets

ROUTER = "shared"
"""Name of the router where all tasks have the same one."""

INIT_STD = 0.01
"""Every A is drawn from N(0, 0.01^2), as in CoIN's code."""


@dataclass
class MoELoRAConfig(LoRAConfig):
    """As in CoIN's scripts, but for the total rank: theirs is 128 with alpha 256."""

    experts: int = 8
    """N; each expert has rank `rank / experts`, so that the stored rank does not depend on N."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts < 1 or self.rank % self.experts:
            raise ValueError(f"experts: {self.experts} must divide rank ({self.rank}); each expert has rank / experts")


@STRATEGIES.register("moelora")
class MoELoRA(ContinualStrategy):
    """N experts of rank r / N in every target, mixed per token by a softmax over all of them.

        y = W0 x + (alpha / r) sum_i softmax(R x)_i B_i A_i x

    The scale is alpha / r with the full r. All experts and the router train through all tasks; nothing protects earlier ones.
    All experts of a module share one dropout mask.
    """

    Config = MoELoRAConfig
    config: MoELoRAConfig
    compiles = False
    state: GateState | None = None
    top_k: int | None = None
    renormalize = True
    gate_input: GateInput = "token"
    normalize = False

    def __init__(self, config: MoELoRAConfig) -> None:
        super().__init__(config)
        self.uses_all_parameters = "vision" not in config.targets  # LLaVA reads its tower before the last layer

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """All experts in every target, in the first stage; nothing after it."""
        paths = find_targets(towers, self.config.targets)
        return TaskPlan(stage.name, ranks={path: self.config.rank for path in paths if path not in towers.adapters})

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Attach the planned experts and their router."""
        for path in plan.ranks:
            layer = towers.attach(path, scale=self.scale, dropout=self.config.dropout)
            self.add_experts(layer, path)
            layer.gate = RouterGate(
                path,
                layer,
                top_k=self.top_k,
                gate_input=self.gate_input,
                normalize=self.normalize,
                renormalize=self.renormalize,
            )
        self.add_routers(towers, plan)

    @property
    def scale(self) -> float:
        """Factor on the sum of the experts."""
        return self.config.alpha / self.config.rank

    def add_experts(self, layer: AdapterLinear, path: str) -> None:
        """The experts of one module; none freezes alone, so they are one parameter."""
        layer.add_branch(
            "experts", self.config.rank, seed=self.seed, path=path, std=INIT_STD, gates=self.config.experts
        )

    def add_routers(self, towers: Towers, plan: TaskPlan) -> None:
        """One router per module, made with the experts."""
        for path in plan.ranks:
            towers.adapters[path].add_router(ROUTER, seed=self.seed, path=path)

    def gate_state(self, towers: Towers, batch: Batch, task: str | None) -> GateState:
        """The gates' view of a batch."""
        return GateState(mask=prompt_mask(batch), router=ROUTER, generating=task is None)

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Give every gate the state of this batch."""
        self.state = self.gate_state(towers, batch, task)
        set_gates(towers, self.state)
        return _generating(self.state)


def set_gates(towers: Towers, state: GateState) -> None:
    """Give every router gate the state of a batch."""
    for layer in towers.adapters.values():
        if isinstance(layer.gate, RouterGate):
            layer.gate.state = state


@contextmanager
def _generating(state: GateState) -> Iterator[None]:
    """Forget the decisions of a generation at its end; those of a training step stay for recomputation and for counting."""
    try:
        yield
    finally:
        if state.generating:
            state.forget()
