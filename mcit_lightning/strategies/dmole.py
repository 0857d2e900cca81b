"""D-MoLE (Ge et al., ICML 2025): LoRA experts where a task's gradients are largest, and an autoencoder per task as router."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcit_lightning.autoencoder import AutoencoderBank, Recipe
from mcit_lightning.features import feature_width, sequence_features
from mcit_lightning.loss import Batch
from mcit_lightning.plans import TaskPlan
from mcit_lightning.routes import SampleGate, best_under_threshold, vote
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES, ContinualStrategy
from mcit_lightning.strategies.dmole_allocator import ExpertAllocator
from mcit_lightning.strategies.dmole_config import DMoLEConfig
from mcit_lightning.tiles import tile_owners
from mcit_lightning.towers import Towers


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
    compiles = False
    uses_all_parameters = False  # a random or uniform expert may be where the loss does not reach

    def __init__(self, config: DMoLEConfig) -> None:
        super().__init__(config)
        self.needs_base_gradients, self.reads_tower = self.needs_scores, self.needs_router
        self.tasks: list[str] = []
        self.bank: AutoencoderBank | None = None
        self.scores: dict[str, float] | None = None
        """Module path -> gradient norm on the current stage's samples; set before `plan`."""
        self.ratios: dict[str, float] | None = None
        """Tower -> share of the budget in the current stage; set before `plan`."""
        self._helpers: dict[tuple[str, bool, int], int] = {}
        self._tested: dict[tuple[str, int], Tensor] = {}
        self._active: Tensor | None = None
        self._preference: Tensor | None = None

    def required_callbacks(self) -> tuple[str, ...]:
        """What measures, splits, allocates and makes the router."""
        needed = ["GradientProbe"] if self.needs_scores else []
        if self.config.splits_by_difficulty:
            needed.append("CurriculumRatio")
        needed.append("BudgetReallocation")
        return (*needed, "RouterSpawn") if self.needs_router else tuple(needed)

    @property
    def needs_scores(self) -> bool:
        """Whether any decision depends on the gradients."""
        return self.config.needs_scores

    @property
    def needs_router(self) -> bool:
        """Whether autoencoders or centroids are asked at evaluation or for the co-expert."""
        return self.config.needs_router

    # -------------------------------------------------------------------------------------------- allocation (section 4.1, 4.2)

    @property
    def allocator(self) -> ExpertAllocator:
        """Where experts go."""
        return ExpertAllocator(self.config, self.seed)

    def check(self, towers: Towers, stages: list[Stage]) -> None:
        """Look for the targets, and whether the budget pays for an expert. Raises as `ExpertAllocator.check`."""
        self.allocator.check(towers)

    def candidates(self, towers: Towers) -> dict[str, list[str]]:
        """Tower -> paths of the linears that may get experts."""
        return self.allocator.candidates(towers)

    def proxy_samples(self, rows: int) -> int:
        """|S| for a task with so many training samples."""
        return min(rows, max(self.config.proxy_minimum, round(self.config.proxy_fraction * rows)))

    def difficulties(self, towers: Towers) -> dict[str, float]:
        """Tower -> difficulty of the modality in the current stage (Eq. 13)."""
        assert self.scores is not None
        return self.allocator.difficulties(towers, self.scores)

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """Experts for the stage: the best candidates of each tower under its share of the budget."""
        return self.allocator.plan(stage, towers, self.scores, self.ratios)

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The planned experts, and room for the task's autoencoder."""
        config = self.config
        if plan.stage not in self.tasks:
            self.tasks.append(plan.stage)
        self.forget_co_experts()
        half = config.expert_dtype == "bfloat16_after_first" and plan.stage != self.tasks[0]
        for path, rank in plan.ranks.items():
            layer = towers.attach(path, scale=config.alpha / config.rank, dropout=config.dropout)
            layer.add_branch(plan.stage, rank, seed=self.seed, path=path)
            for table in (layer.lora_a, layer.lora_b) if half else ():
                table[plan.stage] = nn.Parameter(table[plan.stage].detach().bfloat16())
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
            keep=config.router_keep,
            held_out=config.router_held_out if config.threshold_from == "held_out" else 0.0,
            quantile=config.quantile,
            margin=config.margin,
        )
        return self.bank.fit(stage.name, features, recipe, seed=self.seed + stage.index)

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Decide each sample's experts and give every gate its rows of that decision. Raises as `tile_owners`."""
        self._active = self._preference = None
        if towers.adapters:
            active = self._known(towers, batch) if task is None else self._training(towers, batch, task)
            used = {index for index, any_row in enumerate(active.any(0).tolist()) if any_row}
            self._active = active.to(batch["inputs"]["input_ids"].device, non_blocking=True)
            self._set_gates(towers, batch, self._active, used)
        elif self.needs_router or self.config.targets.get("vision"):
            tile_owners(towers, batch)  # a model that it cannot route raises in the zero-shot evaluation, not after it
        return nullcontext()

    def routed_to(self) -> list[list[str]] | None:
        """Tasks whose experts each sample of the last evaluation batch got.

        First the one that decides: of lowest error, of most votes, or the oracle's own.
        """
        if self._active is None or self._preference is None:
            return None
        known = self._preference.masked_fill(self._active == 0, -torch.inf)
        ranks, counts = known.argsort(dim=1, descending=True, stable=True).tolist(), self._active.sum(1).int().tolist()
        return [[self.tasks[index] for index in row[:count]] for row, count in zip(ranks, counts, strict=True)]

    def plain_lora(self, towers: Towers) -> dict[str, dict[str, list[str]]]:
        """Each task's experts as an adapter of the task's name; a sample's answer uses at most two of them, summed."""
        owners = {
            task: [path for path, layer in towers.adapters.items() if task in layer.lora_b] for task in self.tasks
        }
        return {task: {path: [task] for path in paths} for task, paths in owners.items()}

    def _known(self, towers: Towers, batch: Batch) -> Tensor:
        """[B, T] in {0, 1}, the experts at evaluation (Eq. 10-12)."""
        config = self.config
        if config.router == "oracle":
            return self._oracle(towers, batch)
        assert self.bank is not None
        errors = self.bank.errors(self._test_features(towers, batch))
        if config.route_scope == "batch_vote":
            votes = best_under_threshold(errors, self.bank.threshold, 1).sum(0)
            self._preference = votes.expand_as(errors)
            return vote(votes, config.vote_share).expand_as(errors)
        self._preference = -errors
        return best_under_threshold(errors, self.bank.threshold, config.top_k)

    def _test_features(self, towers: Towers, batch: Batch) -> Tensor:
        """`features` of an evaluation batch, computed once per sample and run: the pretrained model does not change."""
        keys = list(zip(batch["task"], batch.get("index", ()), strict=False))
        known = len(keys) == len(batch["task"]) and all(key in self._tested for key in keys)
        if not towers.any_process(not known):
            return torch.stack([self._tested[key] for key in keys]).to(batch["inputs"]["input_ids"].device)
        features = self.features(towers, batch)
        self.samples_examined += len(features)
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
            errors = self.bank.errors(self._test_features(towers, batch))
            active = active + _one_hot(self._co_expert(errors, own), len(self.tasks))
        self._preference = _one_hot(own, len(self.tasks))
        return active

    def _training(self, towers: Towers, batch: Batch, task: str) -> Tensor:
        """[B, T] in {0, 1}: the stage's expert for every sample, and a co-expert. On the host: nothing waits for the device."""
        current = self.tasks.index(task)
        own = torch.full((len(batch["id"]),), current)
        active = _one_hot(own, len(self.tasks))
        if current == 0 or self.config.co_expert == "none":
            return active
        keys = [(task, self.training, row) for row in batch["index"]]
        if towers.any_process(
            not all(key in self._helpers for key in keys)
        ):  # once per sample: features and earlier tasks never change
            assert self.bank is not None
            errors = self.bank.errors(self.features(towers, batch))
            self._helpers.update(zip(keys, self._co_expert(errors, own.to(errors.device)).tolist(), strict=True))
        helpers = torch.tensor([self._helpers[key] for key in keys])
        if self.config.route_scope == "batch_vote":
            votes = _one_hot(helpers, len(self.tasks)).sum(0)
            winner = votes.argmax()
            enough = (votes[winner] > 0) & (votes[winner] >= self.config.vote_share * votes.sum())
            helpers = torch.where(enough, winner, -1).expand(len(keys))
        return active + _one_hot(helpers, len(self.tasks))

    def forget_co_experts(self) -> None:
        """Look for the co-expert of every sample anew."""
        self._helpers.clear()

    def _co_expert(self, errors: Tensor, own: Tensor) -> Tensor:
        """[B], index of the best task before each sample's own; -1 where there is none."""
        assert self.bank is not None
        allowed = torch.arange(errors.shape[1], device=errors.device) < own.unsqueeze(1)
        if self.config.co_expert == "thresholded":
            allowed = allowed & (errors <= self.bank.threshold)
        best = errors.masked_fill(~allowed, torch.inf).argmin(1)
        return torch.where(allowed.any(1), best, -1)

    def _set_gates(self, towers: Towers, batch: Batch, active: Tensor, used: set[int]) -> None:
        """Each module's gate holds a column per expert that takes part; the vision tower's a row per picture.

        Args:
            used: columns of `active` that are not all zero. Only their experts are computed: a step costs the same after 20 tasks
                as after two.
        """
        rows = {"language": active}
        if self.config.targets.get("vision"):
            rows["vision"] = active.index_select(0, tile_owners(towers, batch))
        columns = {task: index for index, task in enumerate(self.tasks) if index in used}
        layers: dict[str, list[tuple[SampleGate, list[int]]]] = {}
        for path, layer in towers.adapters.items():
            assert isinstance(layer.gate, SampleGate)
            own = [name for name in layer.lora_b if name in columns]
            layer.use(own)
            layers.setdefault(towers.tower_of(path) or "language", []).append((layer.gate, [columns[n] for n in own]))
        for tower, gates in layers.items():  # one gather per tower, not one per module
            index = torch.tensor([column for _, own in gates for column in own], device=active.device, dtype=torch.long)
            parts = rows[tower].index_select(1, index).split([len(own) for _, own in gates], dim=1)
            for (gate, _), value in zip(gates, parts, strict=True):
                gate.value = value


def _one_hot(index: Tensor, classes: int) -> Tensor:
    """[B, classes] in {0, 1}; a row of zeros for the index -1."""
    return F.one_hot(index + 1, classes + 1)[:, 1:].float()
