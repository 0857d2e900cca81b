"""D-MoLE on the tiny model without a Trainer, and evaluation batches that can be cut and joined."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.data.datamodule import ContinualDataModule
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.module import MCITModule
from mcit_lightning.stages import sequential_stages
from mcit_lightning.strategies import DMoLE
from mcit_lightning.validation import build_strategy

Make = Callable[..., ExperimentConfig]
"""Options of the strategy -> the configuration."""

TASKS = ["colours", "shapes", "counts"]
STAGES = sequential_stages(TASKS)


def experiments_in(smoke_root: Path) -> Make:
    """`make("router: oracle", ...)`: the smoke experiment with these options."""

    def make(*strategy: str) -> ExperimentConfig:
        node = ", ".join(("name: dmole", "rank: 4", "alpha: 8", "dropout: 0.0", *strategy))
        overrides = [f"data.root={smoke_root}", "prepare=null", f"strategy={{{node}}}"]
        return load_config(experiments_dir() / "dmole_smoke.yaml", overrides)

    return make


def new_module(config: ExperimentConfig) -> tuple[MCITModule, DMoLE, ContinualDataModule]:
    module = MCITModule(load_backbone(config.backbone), build_strategy(config.strategy), config).eval()
    assert isinstance(module.strategy, DMoLE)
    return module, module.strategy, ContinualDataModule(config, module.processor, STAGES)


def learn(config: ExperimentConfig, stages: int, *, std: float = 0.2) -> tuple[MCITModule, DMoLE, ContinualDataModule]:
    """Some stages as the callbacks would start them, with random scores and random experts, in evaluation mode."""
    module, strategy, stream = new_module(config)
    for stage in STAGES[:stages]:
        stream.stage = stage.index
        generator = torch.Generator().manual_seed(stage.index)
        paths = [path for paths in strategy.candidates(module.towers).values() for path in paths]
        strategy.scores = dict(zip(paths, torch.rand(len(paths), generator=generator).tolist(), strict=True))
        module.grow(strategy.plan(stage, module.towers))
        if strategy.needs_router:
            parts = [strategy.features(module.towers, batch) for batch in stream.probe_loader(24)]
            strategy.fit_router(stage, torch.cat(parts))
    torch.manual_seed(0)
    for layer in module.towers.adapters.values():
        for parameter in layer.lora_b.values():
            torch.nn.init.normal_(parameter, std=std)
    return module, strategy, stream


def evaluation_batches(stream: ContinualDataModule) -> list[dict[str, Any]]:
    stream.evaluate_only(TASKS)
    return [next(iter(loader)) for loader in stream.test_dataloader()]


def left(tensor: Tensor, length: int, value: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (length - tensor.shape[1], 0), value=value)


def merge(parts: list[dict[str, Any]], pad: int, extra: int = 0) -> dict[str, Any]:
    """Evaluation batches as one, left-padded to the longest and `extra` columns more."""
    length = max(part["inputs"]["input_ids"].shape[1] for part in parts) + extra
    inputs = {
        "input_ids": torch.cat([left(part["inputs"]["input_ids"], length, pad) for part in parts]),
        "attention_mask": torch.cat([left(part["inputs"]["attention_mask"], length, 0) for part in parts]),
        "pixel_values": torch.cat([part["inputs"]["pixel_values"] for part in parts]),
    }
    lists = {key: [value for part in parts for value in part[key]] for key in ("task", "id", "num_images")}
    own = [part["strategy_inputs"] for part in parts if "strategy_inputs" in part]
    if own:
        width = max(each["input_ids"].shape[1] for each in own) + extra
        fill = {key: pad if key == "input_ids" else 0 for key in own[0]}
        lists["strategy_inputs"] = {key: torch.cat([left(e[key], width, fill[key]) for e in own]) for key in fill}
    return {"inputs": inputs, **lists}


def rows(batch: dict[str, Any], index: list[int]) -> dict[str, Any]:
    inputs = {key: value[index] for key, value in batch["inputs"].items()}
    own = {key: value[index] for key, value in batch.get("strategy_inputs", {}).items()}
    return {
        "inputs": inputs,
        **({"strategy_inputs": own} if own else {}),
        **{key: [batch[key][i] for i in index] for key in ("task", "id", "num_images")},
    }


def logits(module: MCITModule, batch: dict[str, Any]) -> Tensor:
    """[B, vocabulary] after the prompt, by whatever gates are set."""
    inputs = module.strategy.inputs(batch)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return module.model(**inputs, position_ids=positions).logits[:, -1]


def routed_logits(module: MCITModule, batch: dict[str, Any]) -> Tensor:
    with module.strategy.routing(module.towers, batch, None):
        return logits(module, batch)
