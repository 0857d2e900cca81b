"""Which precision and which Lightning strategy (engine) a run uses."""

import os
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, Strategy

from mcit_lightning.launch import launched_processes
from mcit_lightning.sharding import FSDP2Strategy
from mcit_lightning.zero import ZERO2, ZeRO2Strategy

FSDP2 = "fsdp2"
"""Value of `trainer.strategy` for a decoder whose weights are spread over the processes."""
FSDP2_PRECISIONS = ("auto", "32-true", "bf16-mixed", "bf16-true")
"""Others would convert weights that are sharded already, or scale gradients that other processes know nothing of."""
ENGINES = ("auto", "ddp", "ddp_find_unused_parameters_false", "ddp_find_unused_parameters_true", FSDP2, ZERO2)
"""What `trainer.strategy` takes. `auto`: one device, or DDP with several."""
REFUSED_ENGINES = {
    "fsdp": "FSDP1 cannot be fitted twice, and there is one fit per stage; use fsdp2",
    "model_parallel": "its defaults split single products over the devices; use fsdp2",
    "deepspeed_stage_3": "ZeRO-3 leaves parameters empty outside of forward passes, also after its engine is gone, where probes, "
    f"merging and checkpoints read them; use fsdp2, which shards the frozen decoder, or {ZERO2} for what trains",
    "deepspeed": f"of DeepSpeed only {ZERO2} was tried; use that, or ddp, or fsdp2 where the base does not fit",
    "ddp_spawn": "spawned processes end with each fit; use ddp",
    "ddp_fork": "forked processes end with each fit; use ddp",
    "ddp_notebook": "forked processes end with each fit; use ddp",
}
"""Beginnings of the names of Lightning's other strategies, why they cannot work here, and what to use."""


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


def check_engine(trainer: Mapping[str, Any]) -> None:
    """Refuse an engine that cannot do what a run needs: grow, be fitted once per stage, and save what any other engine loads.

    Raises:
        ValueError: `trainer.strategy` is not one of `ENGINES`, or the precision not one of fsdp2's; says why and what to use.
    """
    engine = trainer.get("strategy", "auto")
    if engine == FSDP2 and str(trainer.get("precision", "auto")) not in FSDP2_PRECISIONS:
        raise ValueError(
            f"trainer.precision: {trainer['precision']!r} is refused under fsdp2; use one of {', '.join(FSDP2_PRECISIONS)}"
        )
    if engine in ENGINES:
        return
    reasons = (reason for name, reason in REFUSED_ENGINES.items() if str(engine).startswith(name))
    reason = next(reasons, f"known are {', '.join(ENGINES)}")
    raise ValueError(f"trainer.strategy: {engine!r} is refused: {reason}")


def engine_arguments(trainer: Mapping[str, Any], *, find_unused: bool) -> dict[str, Any]:
    """Arguments of `lightning.Trainer` that depend on who started the processes and on the engine.

    Args:
        trainer: the `trainer` section.
        find_unused: a trainable parameter may get no gradient in a step.
    """
    arguments: dict[str, Any] = {"strategy": build_engine(trainer, find_unused=find_unused)}
    started = launched_processes()
    if started is not None and trainer.get("devices", "auto") in ("auto", -1, "-1"):
        arguments["devices"] = started[0]
    if started is not None:
        arguments["num_nodes"] = started[1]
    if trainer.get("strategy") == FSDP2:
        arguments["inference_mode"] = False  # weights gathered in inference mode could not be used in training
    return arguments


def build_engine(trainer: Mapping[str, Any], *, find_unused: bool) -> Strategy | str:
    """The Lightning strategy for one Trainer.

    DDP is built here rather than named, for two settings: buffers are not broadcast (rank zero's routing counts would replace
    every rank's), and unused parameters are looked for only where there can be any.

    Args:
        trainer: the `trainer` section.
        find_unused: a trainable parameter may get no gradient in a step.
    """
    engine = str(trainer.get("strategy", "auto"))
    if engine == FSDP2:
        return FSDP2Strategy(planned_devices(trainer), find_unused=find_unused)
    if engine == ZERO2:
        return ZeRO2Strategy()
    if engine.startswith("ddp") or (engine == "auto" and planned_devices(trainer) > 1):
        find_unused = find_unused or "find_unused_parameters_true" in engine
        return DDPStrategy(find_unused_parameters=find_unused, broadcast_buffers=False)
    return engine


def planned_devices(trainer: Mapping[str, Any]) -> int:
    """Processes that torchrun or SLURM has started, or that the `trainer` section asks for (`auto`, -1: a GPU each)."""
    started = launched_processes()
    if started is not None:
        return started[0] * started[1]
    asked, nodes = trainer.get("devices", "auto"), int(trainer.get("num_nodes", 1))
    if isinstance(asked, list):
        count = len(asked)
    elif str(asked) in ("auto", "-1"):
        count = max(1, torch.cuda.device_count()) if trainer.get("accelerator", "auto") != "cpu" else 1
    else:
        count = len(str(asked).split(",")) if "," in str(asked) else int(asked)
    return max(int(os.environ.get("WORLD_SIZE", "1")), count * nodes)
