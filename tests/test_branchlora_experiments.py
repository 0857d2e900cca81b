"""The shipped CoIN experiments of MoELoRA and BranchLoRA: their recipe, and the parameters that they would train."""

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from mcit_lightning.config import ExperimentConfig
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.stages import sequential_stages
from mcit_lightning.towers import Towers
from mcit_lightning.validation import build_strategy

TRAINABLE = {"moelora": 349_904_896, "branchlora": 222_371_840}
"""350 M and 222 M in the BranchLoRA paper, worked out from the shapes."""


def load(name: str) -> ExperimentConfig:
    return load_config(experiments_dir() / f"{name}_llava7b.yaml", ["data.root=/data/coin"])


@pytest.mark.parametrize("name", TRAINABLE)
def test_recipe_is_coins(name: str) -> None:
    config = load(name)
    assert config.data.root == "/data/coin" and config.backbone.id == "llava-hf/llava-1.5-7b-hf"
    assert (
        config.prompt.template == "vicuna"
        and config.backbone.activation_checkpointing
        and config.backbone.train_projector
    )
    assert config.optim.lr == 2e-4 and config.optim.schedule == "cosine" and config.optim.weight_decay == 0
    assert config.trainer["precision"] == "bf16-mixed" and config.trainer["accumulate_grad_batches"] == 8
    sizes = [config.tasks[task].batch_size for task in config.order]
    assert sizes == [14, 14, 16, 6, 14, 6, 8, 10]
    assert config.order == ["scienceqa", "textvqa", "imagenet", "gqa", "vizwiz", "grounding", "vqav2", "ocrvqa"]
    strategy = build_strategy(config.strategy)
    assert strategy.config.alpha / strategy.config.rank == 2 and strategy.config.rank // strategy.config.experts == 16


@pytest.mark.parametrize("name", TRAINABLE)
def test_trainable_parameters_are_the_published_ones(name: str) -> None:
    config = load(name)
    vision = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16)
    text = LlamaConfig(
        vocab_size=32064, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    towers = Towers.of(model)
    strategy, stages = build_strategy(config.strategy), sequential_stages(config.order)
    projector = sum(p.numel() for path in towers.projector for p in model.get_submodule(path).parameters())
    for stage in stages[:2]:  # the second task trains as many: earlier routers are frozen
        strategy.grow(towers, strategy.plan(stage, towers))
        assert sum(p.numel() for p in strategy.trainable(towers, stage)) + projector == TRAINABLE[name]
