"""Merged weights as a Hugging Face model folder: `AutoModelForImageTextToText.from_pretrained(folder)`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mcit_lightning.data.collate import EvalCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.export.card import write_card
from mcit_lightning.export.peft_folder import check_adapters, use_folder
from mcit_lightning.registry import nearest
from mcit_lightning.strategies import BranchLoRA
from mcit_lightning.trained import Trained


def export_merged(trained: Trained, out: Path, adapters: list[str]) -> Path:
    """Add adapters to the base weights and write the model with its processor; it needs no code of this project.

    The run's model is used up: load it again for anything else.

    Args:
        trained: the run.
        out: a folder that does not exist yet, or is empty.
        adapters: names of the adapters to add up (D-MoLE: one or two tasks; BranchLoRA: the task whose mixture it is); empty
            for the only one that there is.

    Raises:
        ValueError: `out` is in use, no or an unknown adapter is named, there is no adapter, or the mixture depends on the input.
    """
    check_adapters(trained)
    gates = _gates(trained, adapters)
    use_folder(out)
    towers = trained.module.towers
    for path, gate in gates.items():
        towers.adapters[path].merge(gate)
    towers.detach_all()
    model: PreTrainedModel = trained.module.model
    nn.Module.to(model, dtype=model.dtype)  # a tuned projector is float32 beside a bfloat16 base
    model.save_pretrained(out)
    trained.module.processor.save_pretrained(out)
    write_card(trained, out, adapter="+".join(adapters) or None, merged=True)
    return out


def _gates(trained: Trained, adapters: list[str]) -> Mapping[str, Tensor]:
    """Module path -> weight of each branch, [E]."""
    module, strategy = trained.module, trained.module.strategy
    if isinstance(strategy, BranchLoRA):
        known = trained.config.order[: trained.stage.row + 1] if strategy.config.task_routers else []
        if adapters not in ([[task] for task in known] or [[]]):
            given = " ".join(adapters) or "nothing"
            wanted = (
                f"name one learnt task: {', '.join(known)}" if known else "leave it out, one router serves all tasks"
            )
            raise ValueError(f"--adapter: is {given}; {wanted}")
        return strategy.fixed_gates(module.towers, _any_prompt(trained), *(adapters or [trained.stage.name]))
    plain = strategy.plain_lora(module.towers)
    if not plain:
        raise ValueError(
            f"{trained.root}: strategy {trained.config.strategy['name']!r} weighs its experts for every token anew; there is "
            "nothing fixed that could be merged"
        )
    if not adapters:
        if len(plain) > 1:
            raise ValueError(f"--adapter: name one or two of {', '.join(plain)}; the run has {len(plain)} adapters")
        adapters = list(plain)
    for name in adapters:
        if name not in plain:
            raise ValueError(f"--adapter: no adapter {name!r}. {nearest(name, plain)}")
    gates = {}
    for path, layer in module.towers.adapters.items():
        chosen = {branch for name in adapters for branch in plain[name].get(path, ())}
        gates[path] = torch.tensor([float(branch in chosen) for branch in layer.lora_b], device=layer.weight.device)
    return gates


def _any_prompt(trained: Trained) -> dict[str, Any]:
    """A batch with one question and no picture; the state of its first token is that of every prompt."""
    collator = EvalCollator(trained.module.processor, trained.config.prompt)
    return collator([Sample("0", trained.stage.name, (), (("user", "?"),))])
