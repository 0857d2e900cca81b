"""ModalPrompt: which prompts a sample gets, what they are chosen by, and what trains."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from clip_checkpoint import WIDTH, write_clip
from dmole_model import evaluation_batches, logits, routed_logits, rows
from stage_steps import Steps
from torch import Tensor

from mcit_lightning.backbone import load_backbone
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.export.merged import export_merged
from mcit_lightning.export.peft_folder import export_peft
from mcit_lightning.key_encoders import Embeddings, KeyEncoder
from mcit_lightning.loss import Batch, answer_logits, sample_losses
from mcit_lightning.strategies import ModalPromptConfig
from mcit_lightning.towers import Towers
from mcit_lightning.trained import Trained

TASKS = ("colours", "shapes", "counts")
Make = Callable[..., Steps]


class Given(KeyEncoder):
    """Embeddings that a test has written down."""

    def __init__(self, image: list[list[float]], has_image: list[float], text: list[list[float]]) -> None:
        self.found = Embeddings(torch.tensor(image), torch.tensor(has_image), torch.tensor(text))

    def widths(self, towers: Towers) -> tuple[int, int]:
        return self.found.image.shape[1], self.found.text.shape[1]

    def embed(self, towers: Towers, batch: Batch) -> Embeddings:
        return self.found

    def check(self, towers: Towers, batch: Batch) -> None:
        pass


IMAGES = [[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]
TEXTS = [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
PROTOTYPES = {
    "colours": [1.0, 0.0, 0.0, 1.0],
    "shapes": [0.0, 1.0, 1.0, 0.0],
    "counts": [3.0, 4.0, 4.0, 3.0],
}
"""Image part and text part; cosines to the unit vectors are 0, 1, 0.6 and 0.8."""


@pytest.fixture
def make(smoke_config: Callable[..., ExperimentConfig]) -> Make:
    def build(*, config: dict[str, Any] | None = None, **options: Any) -> Steps:
        return Steps(smoke_config(strategy={"name": "modalprompt", "length": 2, **options}, **(config or {})))

    return build


def by_hand(run: Steps, stages: int = 3) -> dict[str, Any]:
    """Grow the stages, with the prototypes and embeddings above; an evaluation batch of three samples."""
    run.strategy._encoder = Given(IMAGES, [1.0, 1.0, 0.0], TEXTS)
    for stage in run.stages[:stages]:
        run.strategy.grow(run.towers, run.strategy.plan(stage, run.towers))
        last = run.strategy.prompts[stage.name].transform[-1]
        with torch.no_grad():
            last.weight.zero_()
            last.bias.copy_(torch.tensor(PROTOTYPES[stage.name]))
    return rows(evaluation_batches(run.stream)[0], [0, 1, 2])


def placed(run: Steps, batch: dict[str, Any]) -> Tensor:
    """[B, k, d], the first vector of each prompt in the order in which the decoder sees them."""
    assert run.strategy._soft is not None
    return run.strategy._soft.vectors.unflatten(1, (-1, 2))[:, :, 0]


def first(run: Steps, *names: str) -> Tensor:
    return torch.stack([run.strategy.prompts[name].vectors[0] for name in names])


def test_the_most_similar_prompts_by_hand(make: Make) -> None:
    """Sample 1: 0.5, 0.5 and 0.7; sample 2: 0, 1 and 0.8; sample 3 has no image: 1, 0 and 0.6. The best one is nearest."""
    run = make(top_k=2)
    batch = by_hand(run)
    with run.strategy.routing(run.towers, batch, None):
        assert run.strategy.routed_to() == [["counts", "colours"], ["shapes", "counts"], ["colours", "counts"]]
        found = placed(run, batch)
    for row, names in enumerate((("colours", "counts"), ("counts", "shapes"), ("counts", "colours"))):
        assert torch.equal(found[row], first(run, *names))


@pytest.mark.parametrize(
    ("weight", "best"), [(0.0, ["shapes", "shapes", "colours"]), (1.0, ["colours", "shapes", "colours"])]
)
def test_one_modality_alone(make: Make, weight: float, best: list[str]) -> None:
    """A sample without an image is compared by its question even where the image has all the weight."""
    run = make(top_k=1, image_weight=weight)
    with run.strategy.routing(run.towers, by_hand(run), None):
        assert run.strategy.routed_to() == [[name] for name in best]


def test_as_many_prompts_as_there_are(make: Make) -> None:
    run = make(top_k=5)
    with run.strategy.routing(run.towers, by_hand(run, 2), None):
        assert [sorted(row) for row in run.strategy.routed_to()] == [["colours", "shapes"]] * 3


def test_training_reads_its_own_prompt_behind_the_most_similar_earlier_one(make: Make) -> None:
    """Also where the own prompt is the least similar one; and a later task's prompt is never used."""
    run = make(top_k=2)
    batch = by_hand(run)
    with run.strategy.routing(run.towers, batch, "counts"):
        found = placed(run, batch)
    assert run.strategy.routed_to() is None
    for row, earlier in enumerate(("colours", "shapes", "colours")):  # the first sample is as near to both: the older
        assert torch.equal(found[row], first(run, earlier, "counts"))
    with run.strategy.routing(run.towers, batch, "shapes"):
        assert all(torch.equal(row, first(run, "colours", "shapes")) for row in placed(run, batch))
    with run.strategy.routing(run.towers, batch, "colours"):
        assert all(torch.equal(row, first(run, "colours")) for row in placed(run, batch))


def test_the_loss_by_hand(make: Make) -> None:
    """For `counts`: images 1 - 0.6, 1 - 0.8 and none, questions 1 - 0.8, 1 - 0.8 and 1 - 0.6."""
    run = make()
    run.stream.stage = 2
    by_hand(run)
    batch = run.stream.train_collator(list(run.stream.split("counts", "train"))[:3])
    output = run.loss(batch, run.stages[2])
    torch.testing.assert_close(output.parts["image_alignment"], torch.tensor((0.4 + 0.2) / 3))
    torch.testing.assert_close(output.parts["text_alignment"], torch.tensor((0.2 + 0.2 + 0.4) / 3))
    with run.strategy.routing(run.towers, batch, "counts"):
        predicted = answer_logits(run.module.model, run.strategy._soft.extend(batch))
    torch.testing.assert_close(output.parts["answer"], F.cross_entropy(predicted, batch["targets"]))
    torch.testing.assert_close(output.loss, sum(output.parts.values()))


def test_only_the_tasks_own_prompt_and_transform_move(make: Make) -> None:
    """Although earlier prompts are part of the input, and the projector trains with them."""
    run = make().learn(2)
    stage = run.start(2)
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    run.train(stage)
    moved = {name for name, value in run.module.state_dict().items() if not torch.equal(value, before[name])}
    own = {f"strategy.prompts.counts.{name}" for name, _ in run.strategy.prompts["counts"].named_parameters()}
    projector = {name for name in before if "multi_modal_projector" in name}
    assert len(own) == 5 and moved == own | projector


def test_a_prompt_starts_at_embeddings_of_tokens_that_the_seed_draws(make: Make) -> None:
    states = []
    for seed in (0, 0, 1):
        run = make(config={"seed": seed}, length=4)
        torch.rand(seed + 1)  # nothing is drawn from the global generator
        for stage in run.stages[:2]:
            run.strategy.grow(run.towers, run.strategy.plan(stage, run.towers))
        states.append(run.strategy.state_dict())
    table = run.module.model.get_input_embeddings().weight
    for vector in states[0]["prompts.colours.vectors"]:
        assert (table == vector).all(1).any()
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not any(torch.equal(value, states[2][name]) for name, value in states[0].items())
    assert not torch.equal(states[0]["prompts.colours.vectors"], states[0]["prompts.shapes.vectors"])
    drawn = torch.get_rng_state()
    run.strategy.grow(run.towers, run.strategy.plan(run.stages[2], run.towers))
    assert torch.equal(torch.get_rng_state(), drawn)


def test_samples_of_a_batch_do_not_see_each_others_prompts(make: Make) -> None:
    """Every sample of a batch whose samples get different prompts, against itself alone."""
    run = make(top_k=1)
    run.module.eval()
    batch = by_hand(run)
    together = routed_logits(run.module, batch)
    assert len({row[0] for row in run.strategy.routed_to()}) == 3
    for row in range(3):
        run.strategy._encoder = Given([IMAGES[row]], [float(row < 2)], [TEXTS[row]])
        alone = routed_logits(run.module, rows(batch, [row]))
        torch.testing.assert_close(alone[0], together[row], rtol=1e-4, atol=1e-5)


def test_a_training_loss_of_a_sample_does_not_depend_on_its_batch(make: Make) -> None:
    run = make(top_k=2).learn(2)
    run.start(2)
    run.module.eval()
    samples = list(run.stream.split("counts", "train"))[:4]

    def losses(chosen: list[Any]) -> Tensor:
        batch = run.stream.train_collator(chosen)
        with torch.no_grad(), run.strategy.routing(run.towers, batch, "counts"):
            return sample_losses(run.module.model, run.strategy._soft.extend(batch))

    together = losses(samples)
    for row, sample in enumerate(samples):
        torch.testing.assert_close(losses([sample])[0], together[row], rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing(make: Make) -> None:
    found = []
    for checkpointing in (False, True):
        run = make(config={"backbone": {"activation_checkpointing": checkpointing}}).learn(1)
        stage = run.start(1)
        batch = next(iter(run.stream.train_dataloader()))
        output = run.loss(batch, stage)
        output.loss.backward()
        found.append((output.loss, run.strategy.prompts["shapes"].vectors.grad))
    assert found[0][1].abs().min() > 0
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_after_one_task_evaluation_is_what_was_trained(make: Make) -> None:
    run = make().learn(1)
    batch = evaluation_batches(run.stream)[0]
    at_evaluation = routed_logits(run.module, batch)
    with run.strategy.routing(run.towers, batch, "colours"):
        torch.testing.assert_close(logits(run.module, batch), at_evaluation)
    pretrained = load_backbone(run.module.config.backbone).model.eval()
    with torch.no_grad():
        assert not torch.allclose(pretrained(**batch["inputs"]).logits[:, -1], at_evaluation)


def test_before_any_task_the_model_is_the_pretrained_one(make: Make) -> None:
    run = make()
    batch = evaluation_batches(run.stream)[0]
    with run.strategy.routing(run.towers, batch, None):
        assert run.strategy.inputs(batch) is batch["inputs"] and run.strategy.routed_to() is None


def test_clip_compares_image_and_question_with_one_prototype(make: Make, tmp_path: Path) -> None:
    run = make(key_encoder=str(write_clip(tmp_path / "clip")))
    run.stream.train_collator.reader = run.strategy.sample_reader()
    run.learn(2)
    prototypes = torch.stack([run.strategy.prompts[task].prototype() for task in TASKS[:2]])
    assert prototypes.shape == (2, WIDTH)
    run.stream.stage = 1
    batch = run.stream.train_collator(list(run.stream.split("shapes", "train"))[:3])
    image, _, text = embeddings = run.strategy.key_encoder().embed(run.towers, batch)
    for found, embedded in zip(run.strategy.cosines(run.towers, embeddings), (image, text), strict=True):
        expected = F.normalize(embedded, dim=1) @ F.normalize(prototypes, dim=1).T
        torch.testing.assert_close(found, expected)


def test_exports_are_refused(make: Make, tmp_path: Path) -> None:
    run = make().learn(1)
    config: Any = SimpleNamespace(strategy={"name": "modalprompt"})
    trained = Trained(run.module, config, run.stages[0], tmp_path / "run")
    for export in (
        lambda: export_peft(trained, tmp_path / "out"),
        lambda: export_merged(trained, tmp_path / "out", []),
    ):
        with pytest.raises(ValueError, match="'modalprompt' has put no LoRA into the model"):
            export()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("key", "value"), [("length", 0), ("top_k", 0), ("image_weight", 1.5)])
def test_wrong_values_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{key}: is {value}"):
        ModalPromptConfig(**{key: value})
