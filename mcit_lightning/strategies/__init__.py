"""Continual-learning strategies, by the names that `strategy.name` takes."""

from mcit_lightning.strategies.base import STRATEGIES, ContinualStrategy, StrategyConfig
from mcit_lightning.strategies.bounds import Individual, Joint, ZeroShot
from mcit_lightning.strategies.branchlora import BranchLoRA, BranchLoRAConfig
from mcit_lightning.strategies.disco import DISCO, DISCOConfig
from mcit_lightning.strategies.dmole import DMoLE
from mcit_lightning.strategies.dmole_config import DMoLEConfig
from mcit_lightning.strategies.ewc import EWCConfig, OnlineEWC
from mcit_lightning.strategies.hide import HiDeConfig, HiDeLLaVA
from mcit_lightning.strategies.keeplora import KeepLoRA, KeepLoRAConfig
from mcit_lightning.strategies.lwf import LwF, LwFConfig
from mcit_lightning.strategies.modalprompt import ModalPrompt, ModalPromptConfig
from mcit_lightning.strategies.moelora import MoELoRA, MoELoRAConfig
from mcit_lightning.strategies.mrlora import MRLoRA, MRLoRAConfig
from mcit_lightning.strategies.olora import OLoRA, OLoRAConfig
from mcit_lightning.strategies.reglora import RegLoRA, RegLoRAConfig
from mcit_lightning.strategies.replay import ExperienceReplay, ReplayConfig
from mcit_lightning.strategies.sequential import LoRAConfig, Sequential
from mcit_lightning.strategies.smolora import SMoLoRA, SMoLoRAConfig

__all__ = [
    "DISCO",
    "STRATEGIES",
    "BranchLoRA",
    "BranchLoRAConfig",
    "ContinualStrategy",
    "DISCOConfig",
    "DMoLE",
    "DMoLEConfig",
    "EWCConfig",
    "ExperienceReplay",
    "HiDeConfig",
    "HiDeLLaVA",
    "Individual",
    "Joint",
    "KeepLoRA",
    "KeepLoRAConfig",
    "LoRAConfig",
    "LwF",
    "LwFConfig",
    "MRLoRA",
    "MRLoRAConfig",
    "MoELoRA",
    "MoELoRAConfig",
    "ModalPrompt",
    "ModalPromptConfig",
    "OLoRA",
    "OLoRAConfig",
    "OnlineEWC",
    "RegLoRA",
    "RegLoRAConfig",
    "ReplayConfig",
    "SMoLoRA",
    "SMoLoRAConfig",
    "Sequential",
    "StrategyConfig",
    "ZeroShot",
]
