"""D-MoLE's options on the tiny model: each departure of the released code does what it says, and none is on by default."""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from dmole_model import STAGES, Make, evaluation_batches, experiments_in, learn, merge, new_module, routed_logits, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mcit_lightning.autoencoder import AutoencoderBank, Recipe
from mcit_lightning.features import sequence_features
from mcit_lightning.loss import answer_loss
from mcit_lightning.probe import evaluate_with_checkpointing, gradient_scores, parts
from mcit_lightning.strategies import DMoLEConfig


@pytest.fixture
def experiment(smoke_root: Path) -> Make:
    return experiments_in(smoke_root)


# ------------------------------------------------------------------------------------------------- options without effect


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ("vision_floor: 0.5, targets: {language: [q_proj]}", "vision_floor"),
        ("difficulty: sum_of_norms, targets: {vision: [q_proj]}", "difficulty"),
        ("difficulty: sum_of_norms, curriculum: false", "difficulty"),
        ("unit: layer, allocation: uniform", "unit"),
        ("curriculum: false, allocation: uniform", "curriculum"),
        ("proxy_offload: true, allocation: uniform", "proxy_offload"),
        ("proxy_passes: 2, allocation: random, curriculum: false", "proxy_passes"),
        ("budget: 0.1, budget_parameters: 9999", "budget"),
        ("vote_share: 0.9", "vote_share"),
        ("top_k: 1, route_scope: batch_vote", "top_k"),
        ("top_k: 5, router: oracle", "top_k"),
        ("router_hidden: 3, router: nearest_centroid", "router_hidden"),
        ("router_held_out: 0.5, threshold_from: training", "router_held_out"),
        ("margin: 3.0, router: oracle, co_expert: none", "margin"),
    ],
)
def test_an_option_without_effect_is_refused(options: str, name: str, experiment: Make) -> None:
    with pytest.raises(ValueError, match=rf"strategy: {name}: is .* which has no effect: .*; leave it at "):
        experiment(options)


def test_a_budget_that_pays_for_no_expert_is_refused_before_anything_runs(experiment: Make) -> None:
    module, strategy, _ = new_module(experiment("budget_parameters: 100"))
    with pytest.raises(ValueError, match="budget_parameters: is 100, the smallest expert of rank 4 has 192 parameters"):
        strategy.check(module.towers, STAGES)


# ------------------------------------------------------------------------------------------------------------------ probe


def test_passes_split_the_candidates_and_give_the_same_scores(experiment: Make) -> None:
    module, strategy, stream = new_module(experiment())
    paths = [path for own in strategy.candidates(module.towers).values() for path in own]
    whole = gradient_scores(module.towers, paths, stream.probe_loader(6), 6)
    for count in (2, 3, 40):
        split = parts(module.towers, paths, count)
        assert [path for part in split for path in part] == paths and len(split) == min(count, len(paths))
    sizes = [
        sum(module.model.get_submodule(path).weight.numel() for path in part) for part in parts(module.towers, paths, 3)
    ]  # type: ignore[operator, union-attr]
    assert max(sizes) < 0.5 * sum(sizes)
    again: dict[str, float] = {}
    for part in parts(module.towers, paths, 3):
        again |= gradient_scores(module.towers, part, stream.probe_loader(6), 6)
    assert again == pytest.approx(whole, rel=1e-5)


def test_no_more_than_the_candidates_sums_and_one_gradient_are_alive(
    experiment: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted where a gradient arrives: no other parameter holds one, and only candidates have been given any."""
    import mcit_lightning.weight_gradients as weight_gradients

    module, strategy, stream = new_module(experiment())
    paths = strategy.candidates(module.towers)["language"]
    alive: list[int] = []
    collect = weight_gradients._collect

    def counting(*args: object) -> Callable[[Tensor], None]:
        inner = collect(*args)  # type: ignore[arg-type]

        def hook(parameter: Tensor) -> None:
            alive.append(sum(p.grad is not None for p in module.model.parameters()))
            inner(parameter)

        return hook

    monkeypatch.setattr(weight_gradients, "_collect", counting)
    gradient_scores(module.towers, paths, stream.probe_loader(8), 8)
    assert len(alive) == 2 * len(paths) and set(alive) == {1}  # two batches


def test_scores_are_not_random_and_activations_are_recomputed(experiment: Make) -> None:
    config = experiment()
    config.backbone.activation_checkpointing = True
    module, strategy, stream = new_module(config)
    paths, batches = strategy.candidates(module.towers)["language"], list(stream.probe_loader(8))
    expected = gradient_scores(module.towers, paths, batches, 8)
    for part in module.model.modules():
        if isinstance(getattr(part, "attention_dropout", None), float):
            part.attention_dropout = 0.9  # type: ignore[assignment]
    runs: list[int] = []
    layer = module.model.get_submodule(module.towers.language).layers[0]  # type: ignore[union-attr, index]
    layer.mlp.register_forward_pre_hook(lambda *args: runs.append(1))  # type: ignore[union-attr]
    evaluate_with_checkpointing(module.model)
    assert gradient_scores(module.towers, paths, batches, 8) == pytest.approx(expected, rel=1e-5)
    assert len(runs) == 2 * len(batches)


def test_a_quantised_base_has_no_gradient_to_measure(experiment: Make) -> None:
    for options, refused in (("allocation: proxy", True), ("allocation: random, curriculum: false", False)):
        module, strategy, _ = new_module(experiment(options))
        linear = module.model.get_submodule(strategy.candidates(module.towers)["language"][0])
        linear.weight = torch.nn.Parameter(linear.weight.detach().to(torch.uint8), requires_grad=False)  # type: ignore[operator, union-attr]
        if refused:
            with pytest.raises(ValueError, match=r"is quantised \(torch.uint8\).*allocation to uniform"):
                strategy.check(module.towers, STAGES)
        else:
            strategy.check(module.towers, STAGES)


def test_sums_in_the_models_type_lose_small_gradients(experiment: Make) -> None:
    module, strategy, stream = new_module(experiment())
    module.model.to(torch.bfloat16)
    paths = strategy.candidates(module.towers)["language"]
    collator, dataset = stream.train_collator, stream.probe_loader(16).dataset
    batches = [collator([dataset[index]]) for index in range(16)]
    for batch in batches:
        batch["inputs"]["pixel_values"] = batch["inputs"]["pixel_values"].bfloat16()
    exact = gradient_scores(module.towers, paths, batches, 16)
    rounded = gradient_scores(module.towers, paths, batches, 16, dtype=None)
    assert exact != pytest.approx(rounded, rel=1e-3) and exact == pytest.approx(rounded, rel=0.1)


def test_averaging_over_a_batchs_tokens_depends_on_the_batch(experiment: Make) -> None:
    module, strategy, stream = new_module(experiment())
    paths = strategy.candidates(module.towers)["language"][:1]
    collator, dataset = stream.train_collator, stream.probe_loader(2).dataset
    samples = [dataset[0], replace(dataset[1], turns=(dataset[1].turns[0], ("assistant", "a much longer answer")))]
    one, two = [collator(samples)], [collator([sample]) for sample in samples]
    weight = module.model.get_submodule(paths[0]).weight.requires_grad_(True)
    (gradient,) = torch.autograd.grad(answer_loss(module.model, one[0]).loss, [weight])
    weight.requires_grad_(False)
    by_batch = [gradient_scores(module.towers, paths, batches, 2, by_batch=True)[paths[0]] for batches in (one, two)]
    assert by_batch[0] == pytest.approx(gradient.norm().item(), rel=1e-4)
    assert by_batch[1] == pytest.approx(gradient_scores(module.towers, paths, one, 2)[paths[0]], rel=1e-4)
    assert by_batch[0] != pytest.approx(by_batch[1], rel=1e-2)


# ---------------------------------------------------------------------------------------------------------------- features


def test_a_question_is_read_once_however_many_samples_ask_it(experiment: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, stream = new_module(experiment())
    parts_ = evaluation_batches(stream)
    batch = merge([rows(part, [0, 1, 2]) for part in parts_], module.processor.tokenizer.pad_token_id)
    decoder = module.model.get_submodule(module.towers.language)
    read: list[int] = []
    decoder.register_forward_hook(lambda *args: read.append(args[-1].last_hidden_state.shape[0]))
    found = sequence_features(module.towers, batch)
    assert read == [3]  # nine samples of three tasks, whose samples ask alike
    alone = torch.cat([sequence_features(module.towers, rows(batch, [row])) for row in range(9)])
    torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)


def test_features_in_training_are_those_of_evaluation_whatever_the_dropout(experiment: Make) -> None:
    module, strategy, stream = new_module(experiment())
    batch = next(iter(stream.train_dataloader()))
    expected = strategy.features(module.towers, batch)
    for part in module.model.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.9)
    module.model.train()
    module.model.get_submodule(module.towers.vision).eval()
    modes = [part.training for part in module.model.modules()]
    torch.testing.assert_close(strategy.features(module.towers, batch), expected)
    assert [part.training for part in module.model.modules()] == modes and True in modes and False in modes


def test_a_sample_without_a_question_has_no_text_features(experiment: Make) -> None:
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 2)
    batch = rows(evaluation_batches(stream)[0], [0, 1])
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    image = (ids[0] == module.model.config.image_token_id).nonzero().max()
    mask[0, image + 1 :] = 0
    features = strategy.features(module.towers, batch)
    assert features[0, 32:].isnan().all() and not features[0, :32].isnan().any() and not features[1].isnan().any()
    assert strategy.bank is not None and torch.isfinite(strategy.bank.errors(features)).all()


# ------------------------------------------------------------------------------------------------------------------ router

RECIPE = Recipe(epochs=20, lr=1e-2, lr_end=1e-2, batch_size=8, patience=None, held_out=0.25, quantile=0.95, margin=2.0)


def bank_and_features() -> tuple[AutoencoderBank, Tensor]:
    bank = AutoencoderBank(6, 3, "linear", "standardize")
    bank.add_task("t", torch.device("cpu"))
    return bank, torch.randn(40, 6, generator=torch.Generator().manual_seed(0))


def test_a_threshold_from_the_trained_samples_is_smaller_and_holds_none_out() -> None:
    bank, features = bank_and_features()
    report = bank.fit("t", features, replace(RECIPE, held_out=0.0), seed=0)
    torch.testing.assert_close(bank.threshold[0], 2.0 * bank.errors(features)[:, 0].quantile(0.95))
    assert "held_out_error" not in report
    assert bank.fit("t", features, RECIPE, seed=0)["threshold"] > report["threshold"]


def test_the_last_weights_are_kept_instead_of_the_best() -> None:
    bank, features = bank_and_features()
    recipe = replace(RECIPE, lr=0.8, lr_end=0.8)  # jumps about
    best = bank.fit("t", features, recipe, seed=0)
    last = bank.fit("t", features, replace(recipe, keep="last"), seed=0)
    assert best["train_error"] < last["train_error"]


def test_rows_without_any_feature_are_left_out() -> None:
    bank, features = bank_and_features()
    report = bank.fit("t", features, RECIPE, seed=0)
    empty = torch.full((5, 6), torch.nan)
    assert bank.fit("t", torch.cat([empty, features]), RECIPE, seed=0) == report
    with pytest.raises(ValueError, match="needs at least 2 training samples, there are 0"):
        bank.fit("t", empty, RECIPE, seed=0)


def test_autoencoders_stay_in_float32_in_a_bfloat16_model(experiment: Make) -> None:
    """Lightning's bf16-true casts the module and makes bfloat16 the default type inside a step."""
    module, strategy, stream = learn(experiment("vision_floor: 0.25"), 2)
    assert strategy.bank is not None
    before = {name: value.clone() for name, value in strategy.bank.state_dict().items()}
    module.to(torch.bfloat16)
    for name, value in strategy.bank.state_dict().items():
        assert torch.equal(value, before[name]), name
    batch = evaluation_batches(stream)[0]
    batch["inputs"]["pixel_values"] = batch["inputs"]["pixel_values"].bfloat16()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert strategy.features(module.towers, batch).dtype == torch.float32
        assert torch.isfinite(routed_logits(module, batch)).all()
    finally:
        torch.set_default_dtype(torch.float32)
    moved = strategy.bank.to("meta")
    assert moved.threshold.device.type == "meta" and moved.w1.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------------------- experts


def test_later_experts_in_bfloat16_train_and_survive_a_replay(experiment: Make) -> None:
    config = experiment("vision_floor: 0.25", "expert_dtype: bfloat16_after_first")
    module, strategy, stream = learn(config, 2)
    types = {
        (name, table[name].dtype)
        for layer in module.towers.adapters.values()
        for table in (layer.lora_a, layer.lora_b)
        for name in table
    }
    assert types == {("colours", torch.float32), ("shapes", torch.bfloat16)}
    stream.stage = 1
    batch = next(iter(stream.train_dataloader()))
    with strategy.routing(module.towers, batch, "shapes"):
        answer_loss(module.model, batch).loss.backward()
    grads = [p.grad for p in strategy.trainable(module.towers, STAGES[1]) if p.grad is not None]
    assert grads and {grad.dtype for grad in grads} == {torch.bfloat16} and any(bool(grad.any()) for grad in grads)
    copy = new_module(config)[0]
    copy.replay(module.structure.to_list())
    saved = {name: module.state_dict()[name] for name in module.saved_keys()}
    copy.load_state_dict(saved, strict=False)
    assert all(copy.state_dict()[name].dtype == value.dtype for name, value in saved.items())


def test_with_a_vote_the_co_expert_obeys_its_own_rule(experiment: Make) -> None:
    """`batch_vote` alone sets no threshold; the released code has both options."""
    errors, own = torch.tensor([[0.9, 0.8, 0.1]]), torch.tensor([2])
    for rule, expected in (("best", [1]), ("thresholded", [-1])):
        _, strategy, _ = learn(experiment(f"co_expert: {rule}", "route_scope: batch_vote"), 3)
        assert strategy.bank is not None
        strategy.bank.threshold.fill_(0.5)
        assert strategy._co_expert(errors, own).tolist() == expected


@pytest.mark.parametrize("option", ["router: oracle", "route_scope: batch_vote"])
def test_the_first_task_of_a_route_is_the_one_that_decided(option: str, experiment: Make) -> None:
    module, strategy, stream = learn(experiment(option), 3)
    assert strategy.bank is not None
    strategy.bank.threshold.fill_(1e9)
    for task, batch in zip(strategy.tasks, evaluation_batches(stream), strict=True):
        errors = strategy.bank.errors(strategy.features(module.towers, batch))
        routed_logits(module, batch)
        routes = strategy.routed_to()
        assert routes is not None
        first = {route[0] for route in routes}
        winner = strategy.tasks[int(errors.argmin(1).bincount().argmax())]
        assert first == ({task} if option == "router: oracle" else {winner})


class Operators(TorchDispatchMode):
    """Names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_forward_has_two_products_more_than_the_base_and_reads_nothing_back(experiment: Make) -> None:
    """However many experts a batch mixes. Reading back (`item`, `nonzero`, ...) would wait for the device."""
    module, strategy, stream = learn(experiment("router: oracle", "co_expert: none", "budget: 1.0"), 3)
    mixed = merge([rows(part, [0, 1]) for part in evaluation_batches(stream)], module.processor.tokenizer.pad_token_id)
    products = set()
    for batch in (rows(mixed, [0, 1]), mixed):  # one task, three tasks
        with strategy.routing(module.towers, batch, None):
            layer = next(iter(layer for path, layer in module.towers.adapters.items() if "language" in path))
            with Operators() as whole, torch.no_grad():
                layer(torch.randn(len(batch["task"]), 5, layer.in_features))
        assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & set(whole.names)
        products.add(sum(name in ("mm", "addmm", "bmm", "baddbmm") for name in whole.names))
    assert products == {3}


def test_the_defaults_are_the_papers() -> None:
    config = DMoLEConfig()
    expected = {
        "rank": 8, "alpha": 16.0, "dropout": 0.05, "budget": 0.5, "unit": "module", "allocation": "proxy", "curriculum": True,
        "difficulty": "l2", "vision_floor": 0.0, "proxy_fraction": 0.01, "proxy_bias": False, "proxy_loss": "sample",
        "proxy_accumulate": "float32", "proxy_ranks": "all", "router": "autoencoder", "top_k": 2, "co_expert": "best",
        "route_scope": "sample", "feature_tiles": "all", "feature_masked": True, "router_fraction": 0.01, "router_hidden": 128,
        "router_output": "linear", "router_epochs": 100, "router_lr": 1e-3, "router_patience": None, "router_keep": "best",
        "threshold_from": "held_out", "quantile": 0.95, "expert_dtype": "float32",
    }  # fmt: skip
    assert {name: value for name, value in asdict(config).items() if name in expected} == expected
