"""Which task a sample belongs to: keys, and the frozen embeddings that they are made of."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from clip_checkpoint import POSITIONS, WIDTH, write_clip
from PIL import Image
from torch import Tensor

from mcit_lightning.backbone import Backbone, load_backbone
from mcit_lightning.clip_keys import CLIPKeyEncoder
from mcit_lightning.config import BackboneConfig, ExperimentConfig, PromptConfig
from mcit_lightning.data.collate import EvalCollator, TrainCollator
from mcit_lightning.data.records import Sample
from mcit_lightning.key_encoders import TowerEncoder
from mcit_lightning.loading import experiments_dir, load_config
from mcit_lightning.runner import run
from mcit_lightning.selector import TaskSelector
from mcit_lightning.validation import build_strategy

CPU = torch.device("cpu")


def selector(keys: list[tuple[list[float], list[float]]], *, learned: bool = False) -> TaskSelector:
    """A selector with the given image and text key of each task."""
    found = TaskSelector(learned=learned)
    for number, (image, text) in enumerate(keys):
        found.add_task(f"task{number}", len(image), len(text), CPU)
        found.image_keys[f"task{number}"].data.copy_(torch.tensor(image))
        found.text_keys[f"task{number}"].data.copy_(torch.tensor(text))
    return found


def test_scores_by_hand() -> None:
    """Keys of any length; 0.6 and 0.8 are the cosines of a 3-4-5 triangle."""
    two = selector([([10.0, 0], [0, 2.0]), ([3.0, 4.0], [2.0, 0])])
    image, text = torch.tensor([[5.0, 0], [0, 0]]), torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    scores = two.scores(image, torch.tensor([1.0, 0]), text)
    torch.testing.assert_close(scores, torch.tensor([[1 + 0.8, 0.6 + 0.6], [0.8, 0.6]]))


def test_below_the_smallest_similarity_no_task_is_found() -> None:
    """The mean over what a sample has: (1 + 0.8) / 2, and 0.8 for the one without an image."""
    one = selector([([1.0, 0], [0, 1.0])])
    sample = torch.tensor([[1.0, 0], [0, 0]]), torch.tensor([1.0, 0]), torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    for smallest, expected in ((0.79, [1.0, 1.0]), (0.85, [1.0, 0.0]), (0.91, [0.0, 0.0])):
        index, active = one.choose(*sample, min_similarity=smallest)
        assert index.tolist() == [0, 0] and active is not None and active.tolist() == expected
    assert one.choose(*sample)[1] is None


def test_bfloat16_autocast_does_not_blur_the_scores() -> None:
    close = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([1.0, 1.0, 1.003])
    two = selector([(key.tolist(), key.tolist()) for key in close])
    with torch.autocast("cpu", torch.bfloat16):
        scores = two.scores(close[1][None], torch.ones(1), close[1][None])
        chosen, _ = two.choose(torch.stack(close), torch.ones(2), torch.stack(close))
    assert scores.dtype == torch.float32 and chosen.tolist() == [0, 1]


def unit_batch(size: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(size, 6, generator=generator) + torch.arange(6) for _ in range(2))
    has_image = (torch.rand(size, generator=generator) < 0.7).float()
    return image * has_image.unsqueeze(1), has_image, text


def test_running_sum_is_the_minimum_of_the_alignment_loss_in_any_batching() -> None:
    """The closed form equals what gradient descent on the loss finds."""
    samples = unit_batch(40, 1)
    whole, parts, trained = (selector([([1.0] * 6, [1.0] * 6)], learned=learned) for learned in (False, False, True))
    for found in (whole, parts):
        found.image_keys["task0"].data.zero_()
        found.text_keys["task0"].data.zero_()
    whole.update("task0", *samples)
    for start in range(0, 40, 7):
        parts.update("task0", *(value[start : start + 7] for value in samples))
    optimizer = torch.optim.Adam(trained.parameters(), lr=0.02)
    for _ in range(400):
        optimizer.zero_grad()
        loss = trained.alignment_loss("task0", *samples)
        loss.backward()
        optimizer.step()
    for table in ("image_keys", "text_keys"):
        one, two, three = (
            F.normalize(getattr(found, table)["task0"].detach(), dim=0) for found in (whole, parts, trained)
        )
        torch.testing.assert_close(one, two)
        torch.testing.assert_close(one, three, atol=2e-3, rtol=0)
    assert loss <= whole.alignment_loss("task0", *samples) + 1e-5


def test_keys_stay_in_float32_in_a_bfloat16_model() -> None:
    found = TaskSelector()
    found.add_task("a", 2, 2, CPU)
    found.to(torch.bfloat16)
    for number in range(2000):  # the later half points elsewhere; a sum in bfloat16 would not see it
        unit = torch.tensor([[1.0, 0]] if number < 1000 else [[0, 1.0]])
        found.update("a", unit, torch.ones(1), unit)
    assert found.image_keys["a"].tolist() == found.text_keys["a"].tolist() == [1000.0, 1000.0]


def test_learned_keys_start_at_length_one_and_sums_at_zero() -> None:
    learned, summed = TaskSelector(learned=True), TaskSelector()
    for found in (learned, summed):
        found.add_task("a", 64, 256, CPU)
    assert (
        learned.image_keys["a"].norm() == learned.text_keys["a"].norm() == 1 and learned.image_keys["a"].requires_grad
    )
    assert not summed.image_keys["a"].any() and not summed.image_keys["a"].requires_grad


def test_an_image_means_nothing_to_a_task_that_had_none() -> None:
    found = TaskSelector()
    for task in ("a", "b"):
        found.add_task(task, 2, 2, CPU)
    found.update("a", torch.zeros(3, 2), torch.zeros(3), torch.tensor([[1.0, 0]] * 3))
    found.update("b", torch.tensor([[1.0, 0]]), torch.ones(1), torch.tensor([[0, 1.0]]))
    scores = found.scores(torch.tensor([[1.0, 0]]), torch.ones(1), torch.tensor([[1.0, 0]]))
    torch.testing.assert_close(scores, torch.tensor([[1.0, 1.0]]))


# ------------------------------------------------------------------------------------------------------ the model's own towers


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Four pictures of different colours and shapes: 1, 2, 3 and 4 tiles of InternVL."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, size in enumerate(((28, 28), (56, 28), (84, 28), (56, 56))):
        path = folder / f"{number}.png"
        Image.new("RGB", size, (60 * number, 200 - 50 * number, 120)).save(path)
        paths.append(str(path))
    return paths


def samples(pictures: list[str], *, answers: bool) -> list[Sample]:
    """One image, none, two images, one image."""
    chosen = ([pictures[0]], [], [pictures[1], pictures[3]], [pictures[2]])
    questions = ("What colour is this?", "Which one?", "Which one? red green", "blue?")
    rows = []
    for number, (images, question) in enumerate(zip(chosen, questions, strict=True)):
        turns: Any = (("user", question), ("assistant", "red")) if answers else (("user", question),)
        rows.append(Sample(id=str(number), task="t", images=tuple(images), turns=turns, reference="red"))
    return rows


def collator(backbone: Backbone, *, train: bool, suffix: str = "") -> Any:
    prompt = PromptConfig(template="plain")
    return (
        TrainCollator(backbone.processor, prompt, max_length=512)
        if train
        else EvalCollator(backbone.processor, prompt, suffix=suffix)
    )


@pytest.fixture(scope="module")
def internvl(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    folder = families.build("internvl", tmp_path_factory.mktemp("internvl"))
    return load_backbone(BackboneConfig(id=str(folder)))


@pytest.mark.parametrize("train", [True, False])
def test_tiles_belong_to_their_sample(train: bool, internvl: Backbone, pictures: list[str]) -> None:
    rows = samples(pictures, answers=train)
    batch = collator(internvl, train=train)(rows)
    assert len(batch["inputs"]["pixel_values"]) > sum(batch["num_images"]) == 4
    together = TowerEncoder().embed(internvl.towers, batch)
    assert together.has_image.tolist() == [1, 0, 1, 1] and not together.image[1].any()
    for number, row in enumerate(rows):
        alone = TowerEncoder().embed(internvl.towers, collator(internvl, train=train)([row]))
        for one, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], whole[number], rtol=1e-4, atol=1e-5)
    assert tuple(together.image.shape) == (4, TowerEncoder().widths(internvl.towers)[0])


def test_the_answer_is_not_part_of_the_text(internvl: Backbone, pictures: list[str]) -> None:
    learnt = TowerEncoder().embed(internvl.towers, collator(internvl, train=True)(samples(pictures, answers=True)))
    asked = TowerEncoder().embed(internvl.towers, collator(internvl, train=False)(samples(pictures, answers=False)))
    torch.testing.assert_close(learnt.text, asked.text)


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_packed_patches_are_refused_with_the_remedy(family: str, pictures: list[str], tmp_path: Path) -> None:
    backbone = load_backbone(BackboneConfig(id=str(families.build(family, tmp_path))))
    batch = collator(backbone, train=False)(samples(pictures, answers=False))
    with pytest.raises(ValueError, match=r"strategy\.key_encoder: is null.*Name a CLIP checkpoint"):
        TowerEncoder().embed(backbone.towers, batch)
    strategy: Any = build_strategy({"name": "branchlora"})
    with pytest.raises(ValueError, match=r"strategy\.key_encoder"):  # before any training, not hours later
        strategy.routing(backbone.towers, batch, None)


def test_a_batch_of_text_alone(internvl: Backbone) -> None:
    rows = [Sample(id=str(n), task="t", images=(), turns=(("user", f"Which one? {n}"),)) for n in range(2)]
    found = TowerEncoder().embed(internvl.towers, collator(internvl, train=False)(rows))
    assert not found.image.any() and found.has_image.tolist() == [0, 0] and found.text.any()


# ------------------------------------------------------------------------------------------------------------------------ CLIP


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clip"))


def clip_batch(encoder: CLIPKeyEncoder, backbone: Backbone, rows: list[Sample], suffix: str = "") -> dict[str, Any]:
    collate = collator(backbone, train=False, suffix=suffix)
    collate.reader = encoder.reader
    return collate(rows)  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llava_next", "internvl", "qwen2_vl"])
def test_clip_embeds_the_samples_of_any_backbone(family: str, clip: Path, pictures: list[str], tmp_path: Path) -> None:
    backbone = load_backbone(BackboneConfig(id=str(families.build(family, tmp_path))))
    encoder = CLIPKeyEncoder(str(clip))
    rows = samples(pictures, answers=False)
    together = encoder.embed(backbone.towers, clip_batch(encoder, backbone, rows))
    assert together.image.shape == together.text.shape == (4, WIDTH) and encoder.widths(backbone.towers) == (
        WIDTH,
        WIDTH,
    )
    assert together.has_image.tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(together.text.norm(dim=1), torch.ones(4))
    for number, row in enumerate(rows):
        alone = encoder.embed(backbone.towers, clip_batch(encoder, backbone, [row]))
        for one, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(one[0], whole[number], rtol=1e-4, atol=1e-5)
    # two images: the mean of their unit embeddings
    singles = [
        encoder.embed(backbone.towers, clip_batch(encoder, backbone, [replace(rows[2], images=(image,))])).image[0]
        for image in rows[2].images
    ]
    torch.testing.assert_close(together.image[2], (singles[0] + singles[1]) / 2, rtol=1e-4, atol=1e-5)


def test_clip_equals_its_own_forward(clip: Path, internvl: Backbone, pictures: list[str]) -> None:
    """What `CLIPModel` itself says of the same picture and question."""
    encoder = CLIPKeyEncoder(str(clip))
    row = samples(pictures, answers=False)[0]
    found = encoder.embed(internvl.towers, clip_batch(encoder, internvl, [row]))
    with torch.no_grad(), Image.open(pictures[0]) as image:
        inputs = encoder.reader.processor(text=["What colour is this?"], images=[image], return_tensors="pt")  # type: ignore[operator]
        expected = encoder.model(**inputs)
    torch.testing.assert_close(found.text, expected.text_embeds)
    torch.testing.assert_close(found.image, expected.image_embeds)


def test_of_a_long_question_the_end_stays(clip: Path, internvl: Backbone) -> None:
    encoder = CLIPKeyEncoder(str(clip))
    long = "a" * 200 + " which one?"
    row = Sample(id="1", task="t", images=(), turns=(("user", long),))
    inputs = clip_batch(encoder, internvl, [row], suffix="Answer with one word.")["strategy_inputs"]
    assert inputs["input_ids"].shape == (1, POSITIONS) and "pixel_values" not in inputs
    tokenizer = encoder.reader.processor.tokenizer
    ids = inputs["input_ids"][0].tolist()
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    text = tokenizer.decode(ids[1:-1]).replace(" ", "")
    assert text.endswith("whichone?answerwithoneword.") and text.startswith("aaa")


def test_clip_is_refused_with_the_remedy(clip: Path, smoke_root: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half.mkdir()
    for name in ("config.json", "model.safetensors"):
        (half / name).write_bytes((clip / name).read_bytes())
    other = str(smoke_root / "model")
    for name, reason in ((str(tmp_path), "model_type"), (other, "is a 'llava' model"), (str(half), "cannot load")):
        with pytest.raises(ValueError, match=r"strategy\.key_encoder: cannot load .*Give a folder") as error:
            CLIPKeyEncoder(name)
        assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_run_with_clip_keys(clip: Path, smoke_root: Path, tmp_path: Path) -> None:
    """Keys of CLIP's width are saved, CLIP is not; routing is found again from the checkpoint."""

    def config(*overrides: str) -> ExperimentConfig:
        return load_config(
            experiments_dir() / "branchlora_smoke.yaml",
            [
                f"data.root={smoke_root}",
                "prepare=null",
                f"out={tmp_path / 'run'}",
                "data.limit_train=8",
                "data.limit_val=2",
                "data.limit_test=8",
                "data.num_workers=1",
                "order=[colours,counts]",
                "zero_shot=false",
                "trainer.accelerator=cpu",
                "trainer.enable_progress_bar=false",
                f"strategy.key_encoder={clip}",
                *overrides,
            ],
        )

    results = run(config())
    state = torch.load(tmp_path / "run/stage_02/final.ckpt", weights_only=True)["state_dict"]
    keys = {name: value for name, value in state.items() if "_keys." in name}
    assert len(keys) == 4 and all(value.shape == (WIDTH,) and value.any() for value in keys.values())
    assert not any("clip" in name or "text_model" in name or "vision_model" in name for name in state)
    assert results.routing is not None and results.routing["confusion"].keys() == {"colours", "counts"}


def test_a_missing_clip_ends_a_run_before_it_evaluates(smoke_root: Path, tmp_path: Path) -> None:
    config = load_config(
        experiments_dir() / "branchlora_smoke.yaml",
        [
            f"data.root={smoke_root}",
            "prepare=null",
            f"out={tmp_path / 'run'}",
            "trainer.accelerator=cpu",
            f"strategy.key_encoder={tmp_path / 'nowhere'}",
        ],
    )
    with pytest.raises(ValueError, match=r"strategy\.key_encoder: cannot load"):
        run(config)
    assert not list((tmp_path / "run").glob("predictions/**/*.jsonl"))
