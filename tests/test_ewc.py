"""Online EWC: the Fisher of single samples, its decay, and what the penalty holds in place."""

import pytest
import torch
import torch.nn.functional as F
from stage_steps import Make

from mcit_lightning.loss import answer_logits
from mcit_lightning.snapshots import ParameterTable, tuned_parameters
from mcit_lightning.strategies import EWCConfig


def test_the_fisher_is_the_mean_of_squared_gradients_of_single_samples(steps: Make) -> None:
    run = steps("ewc", samples=3, normalize=False)
    stage = run.start(0)
    run.train(stage)
    run.module.eval()
    parameters = tuned_parameters(run.towers, projector=True)
    assert any("projector" in name for name in parameters) and any("lora_a" in name for name in parameters)
    expected = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for batch in run.stream.probe_loader(3, batch_size=1):
        run.module.zero_grad()
        F.cross_entropy(answer_logits(run.module.model, batch), batch["targets"], reduction="sum").backward()
        for name, parameter in parameters.items():
            expected[name] += parameter.grad**2 / 3
    run.end(stage)
    for name, value in expected.items():
        torch.testing.assert_close(run.strategy.importance[name], value)
        assert torch.equal(run.strategy.anchor[name], parameters[name])


def test_importance_decays_and_adds_up_and_every_task_weighs_alike(steps: Make) -> None:
    run = steps("ewc", samples=2, gamma=0.5).learn(1)
    first = {name: value.clone() for name, value in run.strategy.importance.items()}
    assert sum(value.sum() for value in first.values()) == pytest.approx(1.0, rel=1e-4)
    stage = run.start(1)
    run.train(stage)
    run.end(stage)
    assert sum(v.sum() for _, v in run.strategy.importance.items()) == pytest.approx(1.5, rel=1e-4)
    assert all((run.strategy.importance[name] >= 0.5 * value).all() for name, value in first.items())


def test_the_penalty_by_hand(steps: Make) -> None:
    run = steps("ewc", weight=3.0).learn(1)
    names = run.strategy.importance.rows
    for name in names:
        run.strategy.importance[name] = torch.zeros_like(run.strategy.importance[name])
    importance = torch.zeros_like(run.strategy.importance[names[0]])
    importance[0, 0], importance[1, 1] = 4.0, 1.0
    run.strategy.importance[names[0]] = importance
    parameter = run.module.model.get_parameter(names[0])
    assert run.strategy.penalty(run.module.model).item() == 0
    with torch.no_grad():
        parameter[0, 0] += 0.5
        parameter[1, 1] -= 2.0
        parameter[1, 0] += 7.0  # of no importance
    assert run.strategy.penalty(run.module.model).item() == pytest.approx(3 / 2 * (4 * 0.25 + 1 * 4.0))


def test_a_strong_penalty_holds_what_mattered(steps: Make) -> None:
    moved = []
    for weight in (0.0, 1e6):
        run = steps("ewc", weight=weight, samples=8).learn(1)
        stage = run.start(1)
        run.train(stage, steps=4)
        run.strategy.config.weight = 2.0
        moved.append(run.strategy.penalty(run.module.model).item())
    assert moved[1] < 0.5 * moved[0]


def test_answers_drawn_from_the_model_are_the_same_every_time(steps: Make) -> None:
    fishers = []
    for _ in range(2):
        run = steps("ewc", samples=2, labels="model").learn(1)
        fishers.append(dict(run.strategy.importance.items()))
    assert all(torch.equal(value, fishers[1][name]) for name, value in fishers[0].items())
    data = steps("ewc", samples=2).learn(1).strategy.importance
    assert any(not torch.equal(value, data[name]) for name, value in fishers[0].items())


def test_a_table_keeps_dotted_names_and_swaps_values() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    table = ParameterTable()
    table["0.weight"] = torch.eye(2)
    assert list(table.state_dict()) == ["0/weight"] and "0.weight" in table and len(table) == 1
    before = model[0].weight.detach().clone()
    with table.in_place(model), torch.no_grad():
        assert torch.equal(model(torch.eye(2)), torch.eye(2) + model[0].bias)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize(("key", "value"), [("weight", -1.0), ("gamma", 1.5), ("samples", 0)])
def test_wrong_values_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{key}: is {value}"):
        EWCConfig(**{key: value})
