"""LwF: who teaches, and that the teacher stays out of the student's way."""

import pytest
import torch
from stage_steps import Make

from mcit_lightning.loss import answer_logits
from mcit_lightning.snapshots import tuned_parameters
from mcit_lightning.strategies import LwFConfig


def test_the_teacher_is_the_model_before_the_task(steps: Make) -> None:
    run = steps("lwf", dropout=0.5).learn(1)
    run.module.eval()
    run.stream.stage = 1
    batch = next(iter(run.stream.train_dataloader()))
    before = answer_logits(run.module.model, batch).detach()
    stage = run.start(1)
    first = run.loss(batch, stage)
    run.train(stage)
    assert torch.equal(run.strategy.teacher_logits(run.module.model, batch), before)
    assert all(layer.dropout.training for layer in run.towers.adapters.values()), "dropout is on again"
    moved = run.loss(batch, stage)
    assert moved.parts["distillation"] > 1e-6
    assert first.parts["distillation"].requires_grad and not before.requires_grad


def test_at_the_start_of_a_task_there_is_nothing_to_distil(steps: Make) -> None:
    run = steps("lwf")
    stage = run.start(0)
    batch = next(iter(run.stream.train_dataloader()))
    assert "distillation" not in run.loss(batch, stage).parts
    run.train(stage)
    run.end(stage)
    stage = run.start(1)
    batch = next(iter(run.stream.train_dataloader()))
    assert run.loss(batch, stage).parts["distillation"].item() == pytest.approx(0, abs=1e-6)
    names = tuned_parameters(run.towers, projector=True)
    assert set(run.strategy.teacher.rows) == set(names) and any("projector" in name for name in names)


def test_the_divergence_by_hand(steps: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """softmax([0, ln 9] / 2) = [1/4, 3/4] against [1/2, 1/2]: KL = 3/4 ln 3/2 + 1/4 ln 1/2."""
    from mcit_lightning.strategies import lwf

    run = steps("lwf", weight=10.0).learn(1)
    stage = run.start(1)
    old = torch.tensor([[1.0, 9.0]]).log()
    monkeypatch.setattr(run.strategy, "teacher_logits", lambda *_: old)
    monkeypatch.setattr(lwf, "answer_logits", lambda *_: torch.zeros(1, 2, requires_grad=True))
    output = run.strategy.loss(run.module.model, {"targets": torch.tensor([1])}, stage)
    assert output.parts["distillation"].item() == pytest.approx(0.75 * 0.4054651 - 0.25 * 0.6931472, abs=1e-6)
    assert output.loss.item() == pytest.approx(0.6931472 + 10 * output.parts["distillation"].item())


def test_under_autocast_the_students_weights_are_its_own(steps: Make) -> None:
    """Autocast keeps casts of parameters: the teacher's must not be what the student computes with."""
    run = steps("lwf").learn(1)
    stage = run.start(1)
    run.train(stage)
    batch = next(iter(run.stream.train_dataloader()))
    with torch.autocast("cpu", torch.bfloat16):
        together = run.loss(batch, stage)
    with torch.autocast("cpu", torch.bfloat16):
        alone = answer_logits(run.module.model, batch).float()
    expected = torch.nn.functional.cross_entropy(alone, batch["targets"])
    found = together.loss - run.strategy.config.weight * together.parts["distillation"]
    assert found.item() == pytest.approx(expected.item(), abs=1e-5)
    together.loss.backward()
    assert all(layer.lora_a["lora"].grad.abs().sum() > 0 for layer in run.towers.adapters.values())


@pytest.mark.parametrize(("key", "value"), [("weight", -1.0), ("temperature", 0.0)])
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}: is {value}"):
        LwFConfig(**{key: value})
