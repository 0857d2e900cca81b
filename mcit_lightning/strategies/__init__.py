"""Continual-learning strategies, by the names that `strategy.name` takes."""

from mcit_lightning.strategies.base import STRATEGIES, ContinualStrategy, StrategyConfig
from mcit_lightning.strategies.bounds import Individual, Joint, ZeroShot
from mcit_lightning.strategies.sequential import LoRAConfig, Sequential

__all__ = [
    "STRATEGIES",
    "ContinualStrategy",
    "Individual",
    "Joint",
    "LoRAConfig",
    "Sequential",
    "StrategyConfig",
    "ZeroShot",
]
