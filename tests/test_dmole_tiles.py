"""D-MoLE's features where a sample has several tiles or images, or none, and on models that pack their patches."""

from pathlib import Path
from typing import Any

import families
import pytest
import torch
from PIL import Image

from mcit_lightning.backbone import Backbone, load_backbone
from mcit_lightning.config import BackboneConfig, PromptConfig
from mcit_lightning.data.collate import EvalCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.features import feature_width, sequence_features
from mcit_lightning.tiles import tile_owners
from mcit_lightning.validation import build_strategy


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    return load_backbone(BackboneConfig(id=str(families.build("internvl", tmp_path_factory.mktemp("internvl")))))


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """One tile, no image, two images, three tiles and a thumbnail; the last two ask the same question."""
    folder, paths = tmp_path_factory.mktemp("pictures"), []
    for number, size in enumerate(((28, 28), (56, 28), (56, 56), (84, 28))):
        picture = Image.effect_noise(size, 90).convert("RGB")
        picture.save(folder / f"{number}.png")
        paths.append(str(folder / f"{number}.png"))
    images = ((paths[0],), (), (paths[1], paths[2]), (paths[3],))
    questions = ("What colour is this?", "Which one?", "blue?", "blue?")
    return [
        Sample(id=str(number), task="t", images=own, turns=(("user", question),), reference="red")
        for number, (own, question) in enumerate(zip(images, questions, strict=True))
    ]


def collate(backbone: Backbone, samples: list[Sample]) -> dict[str, Any]:
    return EvalCollator(backbone.processor, PromptConfig(template="plain"))(samples)


@pytest.mark.parametrize("tiles", ["all", "last"])
def test_features_are_a_samples_own(tiles: Any, internvl: Backbone, samples: list[Sample]) -> None:
    batch = collate(internvl, samples)
    assert len(batch["inputs"]["pixel_values"]) > sum(batch["num_images"]) == 4
    together = sequence_features(internvl.towers, batch, tiles=tiles)
    width = feature_width(internvl.towers)[0]
    assert together[1, :width].isnan().all() and not together[[0, 2, 3]].isnan().any()
    torch.testing.assert_close(together[2, width:], together[3, width:])  # the same question
    for number, sample in enumerate(samples):
        alone = sequence_features(internvl.towers, collate(internvl, [sample]), tiles=tiles)
        torch.testing.assert_close(alone[0], together[number], rtol=1e-4, atol=1e-5, equal_nan=True)
    order = [3, 0, 2, 1]
    turned = sequence_features(internvl.towers, collate(internvl, [samples[i] for i in order]), tiles=tiles)
    torch.testing.assert_close(turned, together[order], rtol=1e-4, atol=1e-5, equal_nan=True)


def test_all_tiles_or_the_thumbnail_are_pooled(internvl: Backbone, samples: list[Sample]) -> None:
    """By hand: the maximum over the tokens of the tower, of every tile of the sample and of its last one."""
    batch = collate(internvl, samples)
    width, owners = feature_width(internvl.towers)[0], tile_owners(internvl.towers, batch).tolist()
    with torch.no_grad():
        tower = internvl.model.get_submodule(internvl.towers.vision)
        tokens = tower(batch["inputs"]["pixel_values"]).last_hidden_state
    own = [index for index, owner in enumerate(owners) if owner == 3]
    assert len(own) == 4
    expected = {"all": tokens[own].flatten(0, 1).amax(0), "last": tokens[own[-1]].amax(0)}
    for tiles, value in expected.items():
        found = sequence_features(internvl.towers, batch, tiles=tiles)  # type: ignore[arg-type]
        torch.testing.assert_close(found[3, :width], value, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected["all"], expected["last"])


def test_packed_patches_are_refused_before_any_training(samples: list[Sample], tmp_path: Path) -> None:
    backbone = load_backbone(BackboneConfig(id=str(families.build("qwen2_vl", tmp_path))))
    batch = collate(backbone, samples[:1])
    strategy: Any = build_strategy({"name": "dmole"})
    with pytest.raises(
        ValueError, match="gives its vision tower 2-dimensional pixel values; the strategy needs one picture"
    ):
        strategy.routing(backbone.towers, batch, None)
    alone: Any = {"name": "dmole", "router": "oracle", "co_expert": "none", "targets": {"language": ["q_proj"]}}
    build_strategy(alone).routing(backbone.towers, batch, None)
