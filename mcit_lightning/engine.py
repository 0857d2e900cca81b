"""Which precision and which Lightning strategy (engine) a run uses."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy


def resolve_precision(trainer: Mapping[str, Any]) -> str:
    """`auto` (or nothing): bf16-mixed where the device computes in bfloat16, else 32-true; anything else is taken as it is."""
    precision = str(trainer.get("precision", "auto"))
    if precision != "auto":
        return precision
    on_gpu = trainer.get("accelerator", "auto") != "cpu" and torch.cuda.is_available()
    return "bf16-mixed" if (torch.cuda.is_bf16_supported() if on_gpu else _cpu_has_bfloat16()) else "32-true"


def _cpu_has_bfloat16() -> bool:
    """Whether the processor has instructions for bfloat16 products; it emulates them slowly otherwise."""
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older releases of torch
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def build_engine(trainer: Mapping[str, Any], *, find_unused: bool) -> Strategy | str:
    """The Lightning strategy for one Trainer.

    DDP is built here rather than named, for two settings: buffers are not broadcast (rank zero's routing counts would replace
    every rank's), and unused parameters are looked for only where there can be any.

    Args:
        trainer: the `trainer` section.
        find_unused: a trainable parameter may get no gradient in a step.
    """
    engine = str(trainer.get("strategy", "auto"))
    if engine.startswith("ddp") or (engine == "auto" and planned_devices(trainer) > 1):
        find_unused = find_unused or "find_unused_parameters_true" in engine
        return DDPStrategy(find_unused_parameters=find_unused, broadcast_buffers=False)
    return engine


def planned_devices(trainer: Mapping[str, Any]) -> int:
    """Processes that the `trainer` section asks for; `auto` and -1 are what this machine has."""
    asked, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes", 1))
    if isinstance(asked, list):
        count = len(asked)
    elif str(asked) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count()) if trainer.get("accelerator", "auto") != "cpu" else 1
    else:
        count = len(str(asked).split(",")) if "," in str(asked) else int(asked)
    return max(int(os.environ.get("WORLD_SIZE", "1")), count * nodes)
