"""One LoRA tuned through all tasks: the lower bound that every continual method is measured against."""

from dataclasses import dataclass, field

from mcit_lightning.plans import TaskPlan
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES, ContinualStrategy, StrategyConfig
from mcit_lightning.towers import ALL_LINEAR, Towers, find_targets


@dataclass
class LoRAConfig(StrategyConfig):
    """LoRA (Hu et al., ICLR 2022)."""

    rank: int = 8
    """r: columns of B, rows of A."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Probability of zeroing an element of the adapters' input, in training."""
    targets: dict[str, list[str]] = field(default_factory=lambda: {"language": [ALL_LINEAR]})
    """Tower (`vision`, `language`) -> ends of the paths of the linears that get an adapter, or `all-linear`."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank: is {self.rank}, must be at least 1")
        if not any(self.targets.values()):
            raise ValueError(f"targets: is {self.targets}, must name linears of at least one tower")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: is {self.dropout}, must be in [0, 1)")


@STRATEGIES.register("sequential")
class Sequential(ContinualStrategy):
    """A single LoRA, made in the first stage and tuned on in every later one; nothing protects earlier tasks."""

    Config = LoRAConfig
    config: LoRAConfig

    def __init__(self, config: LoRAConfig) -> None:
        super().__init__(config)
        self.uses_all_parameters = "vision" not in config.targets  # LLaVA reads its tower before the last layer

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """One branch of the configured rank in every target, in the first stage; nothing after it."""
        paths = find_targets(towers, self.config.targets)
        return TaskPlan(stage.name, ranks={path: self.config.rank for path in paths if path not in towers.adapters})

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Attach the planned branches."""
        for path, rank in plan.ranks.items():
            layer = towers.attach(path, scale=self.config.alpha / self.config.rank, dropout=self.config.dropout)
            layer.add_branch("lora", rank, seed=self.seed, path=path)
