"""Adapters as PEFT reads them: `PeftModel.from_pretrained(base_model, folder)`."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.evaluation.files import check_new_folder
from mcit_lightning.export.card import write_card
from mcit_lightning.trained import Trained

PREFIX = "base_model.model."
"""What PEFT puts before a module's path in the base model."""


def export_peft(trained: Trained, out: Path) -> list[Path]:
    """Write one adapter folder per plain LoRA that the run has: D-MoLE's experts of every task, or the one LoRA.

    Several branches of a module that always work together become one of the sum of their ranks, which computes the same. A
    tuned projector is stored whole in every folder (`modules_to_save`).

    Args:
        trained: the run.
        out: a folder that does not exist yet, or is empty.

    Returns:
        The adapter folders; one adapter lies in `out` itself, several below it under their names.

    Raises:
        ValueError: `out` is in use, or the strategy's adapters are no plain LoRA, because their weights depend on the input.
    """
    adapters = trained.module.strategy.plain_lora(trained.module.towers)
    name = trained.config.strategy["name"]
    check_adapters(trained)
    if not adapters:
        raise ValueError(
            f"{trained.root}: the adapters of strategy {name!r} are mixed by a router for every input, which no LoRA of PEFT "
            "can say. Where a task's mixture is fixed (branchlora with gate_input: first), --to merged --adapter TASK works"
        )
    use_folder(out)
    folders = []
    for adapter, branches in adapters.items():
        folder = out if len(adapters) == 1 else out / adapter
        folder.mkdir(parents=True, exist_ok=True)
        _write(trained, branches, folder)
        write_card(trained, folder, adapter=adapter)
        folders.append(folder)
    return folders


def check_adapters(trained: Trained) -> None:
    """Refuse a run whose strategy puts nothing into the model's layers.

    Raises:
        ValueError: it has no adapter layer.
    """
    if not trained.module.towers.adapters:
        raise ValueError(
            f"{trained.root}: strategy {trained.config.strategy['name']!r} has put no LoRA into the model, so there is nothing "
            "to export. mcit-lightning chat answers with what it has learnt"
        )


def use_folder(out: Path) -> None:
    """Make a folder that must be new or empty.

    Raises:
        ValueError: it is in use.
    """
    check_new_folder(out)
    out.mkdir(parents=True, exist_ok=True)


def joined(layer: AdapterLinear, branches: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The branches as one: A [sum of ranks, d_in] and B [d_out, sum of ranks]."""
    a = torch.cat([layer.lora_a[layer.trunk_of[name]].detach() for name in branches])
    b = torch.cat([layer.lora_b[name].detach() for name in branches], dim=1)
    return a.cpu().contiguous(), b.cpu().contiguous()


def _write(trained: Trained, branches: dict[str, list[str]], folder: Path) -> None:
    module = trained.module
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for path, names in branches.items():
        layer = module.towers.adapters[path]
        a, b = joined(layer, names)
        tensors[f"{PREFIX}{path}.lora_A.weight"], tensors[f"{PREFIX}{path}.lora_B.weight"] = a, b
        ranks[path], alphas[path] = a.shape[0], layer.scale * a.shape[0]
    projector = list(module.towers.projector) if trained.config.backbone.train_projector else []
    for path in projector:
        for name, value in module.model.get_submodule(path).state_dict().items():
            tensors[f"{PREFIX}{path}.{name}"] = value.detach().cpu().contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    rank, alpha = max(ranks.values()), max(alphas.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": trained.config.backbone.id,
        "revision": trained.config.backbone.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(branches),
        "rank_pattern": {path: value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {path: value for path, value in alphas.items() if value != alpha},
        "modules_to_save": projector or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
