"""D-MoLE (Ge et al., ICML 2025): LoRA experts where a task's gradients are largest, and an autoencoder per task as router."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.allocation import by_layer, difficulty, fill, natural, ranked, shares, shuffled, split_budget
from mcit_lightning.autoencoder import AutoencoderBank, Recipe
from mcit_lightning.features import feature_width, sequence_features
from mcit_lightning.loss import Batch
from mcit_lightning.plans import TaskPlan
from mcit_lightning.routes import SampleGate, best_under_threshold, vote
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES, ContinualStrategy
from mcit_lightning.strategies.dmole_config import DMoLEConfig
from mcit_lightning.tiles import tile_owners
from mcit_lightning.towers import Towers, find_targets


@STRATEGIES.register("dmole")
class DMoLE(ContinualStrategy):
    """A LoRA expert per task, only in the modules that the allocator chose for it; all earlier experts stay as they are.

        y = W0 x + (alpha / r) sum over k of g_k I_k B_k A_k x        (Eq. 2)

    I_k says whether task k has an expert in the module, g_k in {0, 1} whether the sample uses it. In training those are the new
    expert and, per sample, the earlier one whose autoencoder reconstructs it best; at evaluation the (at most two) best whose
    error is under the task's threshold. A sample that no autoencoder knows gets the pretrained model.

    Scores of the modules come from `callbacks.GradientProbe`, the split of the budget from `callbacks.CurriculumRatio`, and
    `callbacks.BudgetReallocation` carries the plan out.
    """

    Config = DMoLEConfig
    config: DMoLEConfig
    uses_all_parameters = False  # a random or uniform expert may be where the loss does not reach

    def __init__(self, config: DMoLEConfig) -> None:
        super().__init__(config)
        self.needs_base_gradients = self.needs_scores
        self.tasks: list[str] = []
        self.bank: AutoencoderBank | None = None
        self.scores: dict[str, float] | None = None
        """Module path -> gradient norm on the current stage's samples; set before `plan`."""
        self.ratios: dict[str, float] | None = None
        """Tower -> share of the budget in the current stage; set before `plan`."""
        self._helpers: dict[tuple[str, bool, int], int] = {}
        self._tested: dict[tuple[str, int], Tensor] = {}
        self._active: Tensor | None = None
        self._errors: Tensor | None = None

    def required_callbacks(self) -> tuple[str, ...]:
        """What measures, splits, allocates and makes the router."""
        needed = ["GradientProbe"] if self.needs_scores else []
        if self.config.curriculum and len(self.config.targets) > 1 and self.config.allocation != "uniform":
            needed.append("CurriculumRatio")
        needed.append("BudgetReallocation")
        return (*needed, "RouterSpawn") if self.needs_router else tuple(needed)

    @property
    def needs_scores(self) -> bool:
        """Whether any decision depends on the gradients."""
        if self.config.allocation == "uniform":
            return False
        return self.config.allocation == "proxy" or (self.config.curriculum and len(self.config.targets) > 1)

    @property
    def needs_router(self) -> bool:
        """Whether autoencoders or centroids are asked at evaluation or for the co-expert."""
        return self.config.router != "oracle" or self.config.co_expert != "none"

    # -------------------------------------------------------------------------------------------- allocation (section 4.1, 4.2)

    def check(self, towers: Towers, stages: list[Stage]) -> None:
        """Look for the targets."""
        self.candidates(towers)

    def candidates(self, towers: Towers) -> dict[str, list[str]]:
        """Tower -> paths of the linears that may get experts."""
        return {
            tower: sorted(find_targets(towers, {tower: suffixes}), key=natural)
            for tower, suffixes in self.config.targets.items()
            if suffixes
        }

    def proxy_samples(self, rows: int) -> int:
        """|S| for a task with so many training samples."""
        return min(rows, max(self.config.proxy_minimum, round(self.config.proxy_fraction * rows)))

    def difficulties(self, towers: Towers) -> dict[str, float]:
        """Tower -> difficulty of the modality in the current stage (Eq. 13)."""
        assert self.scores is not None
        candidates = self.candidates(towers)
        own = {tower: {path: self.scores[path] for path in paths} for tower, paths in candidates.items()}
        return difficulty(own, self.config.difficulty)

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """Experts for the stage: the best candidates of each tower under its share of the budget."""
        candidates = self.candidates(towers)
        config = self.config
        if config.allocation == "uniform":
            rank = max(1, round(config.budget * config.rank))
            chosen = {tower: dict.fromkeys(paths, rank) for tower, paths in candidates.items()}
            ratios = shares({tower: float(len(paths)) for tower, paths in candidates.items()})
        else:
            ratios = self.ratios or shares({tower: float(len(paths)) for tower, paths in candidates.items()})
            chosen = {
                tower: dict.fromkeys(paths, config.rank)
                for tower, paths in self._choose(candidates, ratios, towers, stage).items()
            }
        extra = {
            "budget": {tower: len(paths) for tower, paths in chosen.items()},
            "difficulty": self.difficulties(towers) if self.scores else {},
            "scores": {path: self.scores[path] for paths in candidates.values() for path in paths}
            if self.scores
            else {},
        }
        ranks = {path: rank for tower in candidates for path, rank in chosen[tower].items()}
        return TaskPlan(stage.name, ranks=ranks, ratios=ratios, extra=extra)

    def _choose(
        self, candidates: Mapping[str, list[str]], ratios: Mapping[str, float], towers: Towers, stage: Stage
    ) -> dict[str, list[str]]:
        """Tower -> modules that get an expert, in the model's order."""
        config = self.config
        units = self._units(candidates)
        budget = max(1, int(config.budget * sum(len(own) for own in units.values()) + 0.5))
        if (
            self.scores is not None
        ):  # a linear that the loss does not reach (behind the layer that LLaVA reads) is of no use
            reached = {path for path, score in self.scores.items() if score > 0}
            units = self._units({tower: [p for p in paths if p in reached] for tower, paths in candidates.items()})
        capacity = {tower: len(own) for tower, own in units.items()}
        if not any(capacity.values()):
            raise ValueError(
                f"strategy: no gradient reaches a candidate in stage {stage.name!r}; check strategy.targets"
            )
        orders = {tower: self._order(tower, own, stage) for tower, own in units.items()}
        if config.budget_parameters is None:
            counts = split_budget(min(budget, sum(capacity.values())), ratios, capacity, config.vision_floor)
            picked = {tower: orders[tower][: counts[tower]] for tower in units}
        else:
            picked = self._fill(units, orders, ratios, towers)
        return {
            tower: sorted((path for unit in chosen for path in units[tower][unit]), key=natural)
            for tower, chosen in picked.items()
        }

    def _units(self, candidates: Mapping[str, list[str]]) -> dict[str, dict[str, list[str]]]:
        """Tower -> unit -> the modules that it stands for."""
        if self.config.unit == "module":
            return {tower: {path: [path] for path in paths} for tower, paths in candidates.items()}
        return {
            tower: {layer: list(own) for layer, own in by_layer(dict.fromkeys(paths, 0.0)).items()}
            for tower, paths in candidates.items()
        }

    def _order(self, tower: str, units: Mapping[str, list[str]], stage: Stage) -> list[str]:
        """A tower's units, those to take first in front."""
        if self.config.allocation == "random":
            return shuffled(list(units), f"{self.seed}/{stage.index}/{tower}")
        assert self.scores is not None, "callbacks.GradientProbe runs before the plan"
        scores = self.scores
        return ranked({unit: sum(scores[path] ** 2 for path in paths) ** 0.5 for unit, paths in units.items()})

    def _fill(
        self,
        units: Mapping[str, Mapping[str, list[str]]],
        orders: Mapping[str, list[str]],
        ratios: Mapping[str, float],
        towers: Towers,
    ) -> dict[str, list[str]]:
        """The best units of each tower whose parameters fit into its share of `budget_parameters`."""
        assert self.config.budget_parameters is not None
        sizes = {
            tower: {unit: sum(self._expert_size(towers, path) for path in paths) for unit, paths in own.items()}
            for tower, own in units.items()
        }
        capacity = {tower: sum(own.values()) for tower, own in sizes.items()}
        total = min(self.config.budget_parameters, sum(capacity.values()))
        room = split_budget(total, ratios, capacity, self.config.vision_floor)
        return {tower: fill(orders[tower], sizes[tower], room[tower]) for tower in units}

    def _expert_size(self, towers: Towers, path: str) -> int:
        layer = towers.model.get_submodule(path)
        assert isinstance(layer, nn.Linear | AdapterLinear)
        return self.config.rank * (layer.in_features + layer.out_features)

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The planned experts, and room for the task's autoencoder."""
        config = self.config
        if plan.stage not in self.tasks:
            self.tasks.append(plan.stage)
        self._helpers.clear()
        for path, rank in plan.ranks.items():
            layer = towers.attach(path, scale=config.alpha / config.rank, dropout=config.dropout)
            layer.add_branch(plan.stage, rank, seed=self.seed, path=path)
            layer.gate = layer.gate if isinstance(layer.gate, SampleGate) else SampleGate()
        if self.needs_router:
            if self.bank is None:
                hidden = config.router_hidden if config.router == "autoencoder" else 0
                width = sum(feature_width(towers))
                self.bank = AutoencoderBank(width, hidden, config.router_output, config.router_scaling)
            self.bank.add_task(plan.stage, towers.model.device)

    def trainable(self, towers: Towers, stage: Stage) -> Iterator[nn.Parameter]:
        """The stage's experts; all earlier ones, and the autoencoders, stay as they are."""
        for layer in towers.adapters.values():
            if stage.name in layer.lora_b:
                yield from (layer.lora_a[stage.name], layer.lora_b[stage.name])

    # --------------------------------------------------------------------------------------------------- routing (section 4.3)

    def router_samples(self, rows: int) -> int:
        """Samples of the autoencoder, those that set its threshold included."""
        if not self.needs_router:
            return 0
        return min(rows, max(self.config.router_minimum, round(self.config.router_fraction * rows)))

    def features(self, towers: Towers, batch: Batch) -> Tensor:
        """[B, d_v + d_l], the sequence features (Eq. 6-7)."""
        return sequence_features(towers, batch, tiles=self.config.feature_tiles, masked=self.config.feature_masked)

    def fit_router(self, stage: Stage, features: Tensor) -> dict[str, float]:
        """Train the stage's autoencoder (Eq. 8-9) and set its threshold."""
        assert self.bank is not None
        config = self.config
        recipe = Recipe(
            epochs=config.router_epochs,
            lr=config.router_lr,
            lr_end=config.router_lr_end or config.router_lr,
            batch_size=config.router_batch_size,
            patience=config.router_patience,
            held_out=config.router_held_out,
            quantile=config.quantile,
            margin=config.margin,
        )
        return self.bank.fit(stage.name, features, recipe, seed=self.seed + stage.index)

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Decide each sample's experts and give every gate its rows of that decision."""
        self._active = self._errors = None
        if towers.adapters:
            active = self._known(towers, batch) if task is None else self._training(towers, batch, task)
            self._set_gates(towers, batch, active)
            self._active = active
        return nullcontext()

    def routed_to(self) -> list[list[str]] | None:
        """Tasks whose experts each sample of the last evaluation batch got, lowest error first."""
        if self._active is None:
            return None
        order = self._active if self._errors is None else -self._errors
        ranks = order.masked_fill(self._active == 0, -torch.inf).argsort(dim=1, descending=True, stable=True).tolist()
        counts = self._active.sum(1).int().tolist()
        return [[self.tasks[index] for index in row[:count]] for row, count in zip(ranks, counts, strict=True)]

    def _known(self, towers: Towers, batch: Batch) -> Tensor:
        """[B, T] in {0, 1}, the experts at evaluation (Eq. 10-12)."""
        config = self.config
        if config.router == "oracle":
            return self._oracle(towers, batch)
        assert self.bank is not None
        self._errors = self.bank.errors(self._test_features(towers, batch))
        if config.route_scope == "batch_vote":
            return vote(self._errors, self.bank.threshold, config.vote_share)
        return best_under_threshold(self._errors, self.bank.threshold, config.top_k)

    def _test_features(self, towers: Towers, batch: Batch) -> Tensor:
        """`features` of an evaluation batch, computed once per sample and run: the pretrained model does not change."""
        keys = list(zip(batch["task"], batch.get("index", ()), strict=False))
        known = len(keys) == len(batch["task"]) and all(key in self._tested for key in keys)
        if not towers.any_process(not known):
            return torch.stack([self._tested[key] for key in keys]).to(batch["inputs"]["input_ids"].device)
        features = self.features(towers, batch)
        if len(self._tested) + len(keys) <= self.config.feature_cache:
            self._tested.update(zip(keys, features.cpu(), strict=False))
        return features

    def _oracle(self, towers: Towers, batch: Batch) -> Tensor:
        """The true task's expert with the co-expert that it had in training; nothing for a task that was not learnt yet."""
        known = [self.tasks.index(task) if task in self.tasks else -1 for task in batch["task"]]
        own = torch.tensor(known, device=batch["inputs"]["input_ids"].device)
        active = _one_hot(own, len(self.tasks))
        if self.config.co_expert != "none":
            assert self.bank is not None
            self._errors = self.bank.errors(self._test_features(towers, batch))
            active = active + _one_hot(self._co_expert(self._errors, own), len(self.tasks))
        return active

    def _training(self, towers: Towers, batch: Batch, task: str) -> Tensor:
        """[B, T] in {0, 1}: the stage's expert for every sample, and a co-expert."""
        size, current = len(batch["id"]), self.tasks.index(task)
        device = batch["inputs"]["input_ids"].device
        own = torch.full((size,), current, device=device)
        active = _one_hot(own, len(self.tasks))
        if current == 0 or self.config.co_expert == "none":
            return active
        keys = [(task, self.training, row) for row in batch["index"]]
        if towers.any_process(
            not all(key in self._helpers for key in keys)
        ):  # once per sample: features and earlier tasks never change
            assert self.bank is not None
            helpers = self._co_expert(self.bank.errors(self.features(towers, batch)), own)
            self._helpers.update(zip(keys, helpers.tolist(), strict=True))
        helpers = torch.tensor([self._helpers[key] for key in keys], device=device)
        if self.config.route_scope == "batch_vote":
            votes = _one_hot(helpers, len(self.tasks)).sum(0)
            winner = votes.argmax()
            enough = votes[winner] >= self.config.vote_share * votes.sum().clamp(min=1)
            helpers = torch.where(enough, winner, torch.full_like(winner, -1)).expand(size)
        return active + _one_hot(helpers, len(self.tasks))

    def _co_expert(self, errors: Tensor, own: Tensor) -> Tensor:
        """[B], index of the best task before each sample's own; -1 where there is none."""
        assert self.bank is not None
        allowed = torch.arange(errors.shape[1], device=errors.device) < own.unsqueeze(1)
        if self.config.co_expert == "thresholded" or self.config.route_scope == "batch_vote":
            allowed = allowed & (errors <= self.bank.threshold)
        best = errors.masked_fill(~allowed, torch.inf).argmin(1)
        return torch.where(allowed.any(1), best, -1)

    def _set_gates(self, towers: Towers, batch: Batch, active: Tensor) -> None:
        """Each module's gate holds a column per expert that the module has; the vision tower's a row per picture."""
        rows = {"language": active}
        if "vision" in self.config.targets:
            rows["vision"] = active.index_select(0, tile_owners(towers, batch))
        columns = {task: index for index, task in enumerate(self.tasks)}
        layers: dict[str, list[tuple[SampleGate, list[int]]]] = {}
        for path, layer in towers.adapters.items():
            assert isinstance(layer.gate, SampleGate)
            tower = towers.tower_of(path) or "language"
            layers.setdefault(tower, []).append((layer.gate, [columns[name] for name in layer.lora_b]))
        for tower, gates in layers.items():  # one gather per tower, not one per module
            index = torch.tensor([column for _, own in gates for column in own], device=active.device)
            parts = rows[tower].index_select(1, index).split([len(own) for _, own in gates], dim=1)
            for (gate, _), value in zip(gates, parts, strict=True):
                gate.value = value


def _one_hot(index: Tensor, classes: int) -> Tensor:
    """[B, classes] in {0, 1}; a row of zeros for the index -1."""
    return F.one_hot(index + 1, classes + 1)[:, 1:].float()
