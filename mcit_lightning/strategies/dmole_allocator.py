"""D-MoLE's expert allocator: from gradient norms and the split of the budget to a task's plan."""

from collections.abc import Mapping

from torch import Tensor, nn

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.allocation import by_layer, difficulty, fill, natural, ranked, shares, shuffled, split_budget
from mcit_lightning.plans import TaskPlan
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.dmole_config import DMoLEConfig
from mcit_lightning.towers import Towers, find_targets

Units = Mapping[str, Mapping[str, list[str]]]
"""Tower -> unit (a module or a layer) -> the modules that it stands for."""


class ExpertAllocator:
    """Decides which modules get an expert for a task (Ge et al., ICML 2025, sections 4.1 and 4.2); without side effects.

    Args:
        config: the strategy's hyper-parameters.
        seed: of the random baseline.
    """

    def __init__(self, config: DMoLEConfig, seed: int) -> None:
        self.config = config
        self.seed = seed

    def check(self, towers: Towers) -> None:
        """Look for the targets.

        Raises:
            ValueError: a target matches nothing, no expert fits into `budget_parameters`, or weights have no gradient to measure.
        """
        candidates, budget = self.candidates(towers), self.config.budget_parameters
        for path in [path for paths in candidates.values() for path in paths] if self.config.needs_scores else []:
            weight = towers.model.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            if not weight.is_floating_point():
                raise ValueError(
                    f"strategy.allocation: {path} is quantised ({weight.dtype}), so its gradient cannot be measured; set "
                    "strategy.allocation to uniform, or to random with strategy.curriculum=false"
                )
        if budget is not None:
            units = [paths for own in self._units(candidates).values() for paths in own.values()]
            least = min(sum(self._expert_size(towers, path) for path in paths) for paths in units)
            if budget < least:
                raise ValueError(
                    f"strategy.budget_parameters: is {budget}, the smallest expert of rank {self.config.rank} has {least:,} "
                    "parameters; raise the budget or lower strategy.rank"
                )

    def candidates(self, towers: Towers) -> dict[str, list[str]]:
        """Tower -> paths of the linears that may get experts.

        Raises:
            ValueError: a target matches nothing.
        """
        return {
            tower: sorted(find_targets(towers, {tower: suffixes}), key=natural)
            for tower, suffixes in self.config.targets.items()
            if suffixes
        }

    def difficulties(self, towers: Towers, scores: Mapping[str, float]) -> dict[str, float]:
        """Tower -> difficulty of the modality (Eq. 13), from the scores of all candidates."""
        own = {tower: {path: scores[path] for path in paths} for tower, paths in self.candidates(towers).items()}
        return difficulty(own, self.config.difficulty)

    def plan(
        self, stage: Stage, towers: Towers, scores: Mapping[str, float] | None, ratios: Mapping[str, float] | None
    ) -> TaskPlan:
        """The stage's experts: the best candidates of each tower under its share of the budget.

        Args:
            scores: module path -> gradient norm; None where no decision depends on it.
            ratios: tower -> share of the budget; None splits it by the number of candidates.

        Raises:
            ValueError: the loss reaches no candidate.
        """
        candidates, config = self.candidates(towers), self.config
        even = shares({tower: float(len(paths)) for tower, paths in candidates.items()})
        split = even if config.allocation == "uniform" else dict(ratios or even)
        if config.allocation == "uniform":
            rank = max(1, round(config.budget * config.rank))
            ranks = {path: rank for paths in candidates.values() for path in paths}
        else:
            chosen = self._choose(candidates, split, towers, stage, scores)
            ranks = {path: config.rank for paths in chosen.values() for path in paths}
        extra = {
            "budget": {tower: sum(path in ranks for path in paths) for tower, paths in candidates.items()},
            "difficulty": self.difficulties(towers, scores) if scores else {},
            "scores": {path: scores[path] for paths in candidates.values() for path in paths} if scores else {},
        }
        return TaskPlan(stage.name, ranks=ranks, ratios=split, extra=extra)

    def _choose(
        self,
        candidates: Mapping[str, list[str]],
        ratios: Mapping[str, float],
        towers: Towers,
        stage: Stage,
        scores: Mapping[str, float] | None,
    ) -> dict[str, list[str]]:
        """Tower -> modules that get an expert, in the model's order."""
        config = self.config
        units: Units = self._units(candidates)
        budget = max(1, int(config.budget * sum(len(own) for own in units.values()) + 0.5))
        if scores is not None:  # a linear that the loss does not reach (behind the layer that LLaVA reads) is of no use
            reached = {path for path, score in scores.items() if score > 0}
            units = self._units({tower: [p for p in paths if p in reached] for tower, paths in candidates.items()})
        capacity = {tower: len(own) for tower, own in units.items()}
        if not any(capacity.values()):
            raise ValueError(
                f"strategy: no gradient reaches a candidate in stage {stage.name!r}; check strategy.targets"
            )
        orders = {tower: self._order(tower, own, stage, scores) for tower, own in units.items()}
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
        if self.config.unit == "module":
            return {tower: {path: [path] for path in paths} for tower, paths in candidates.items()}
        return {
            tower: {layer: list(own) for layer, own in by_layer(dict.fromkeys(paths, 0.0)).items()}
            for tower, paths in candidates.items()
        }

    def _order(
        self, tower: str, units: Mapping[str, list[str]], stage: Stage, scores: Mapping[str, float] | None
    ) -> list[str]:
        """A tower's units, those to take first in front."""
        if self.config.allocation == "random":
            return shuffled(list(units), f"{self.seed}/{stage.index}/{tower}")
        assert scores is not None, "callbacks.GradientProbe runs before the plan"
        return ranked({unit: sum(scores[path] ** 2 for path in paths) ** 0.5 for unit, paths in units.items()})

    def _fill(
        self, units: Units, orders: Mapping[str, list[str]], ratios: Mapping[str, float], towers: Towers
    ) -> dict[str, list[str]]:
        """The best units of each tower whose parameters fit into its share of `budget_parameters`; at least one in all."""
        assert self.config.budget_parameters is not None
        sizes = {
            tower: {unit: sum(self._expert_size(towers, path) for path in paths) for unit, paths in own.items()}
            for tower, own in units.items()
        }
        capacity = {tower: sum(own.values()) for tower, own in sizes.items()}
        total = min(self.config.budget_parameters, sum(capacity.values()))
        room = split_budget(total, ratios, capacity, self.config.vision_floor)
        picked = {tower: fill(orders[tower], sizes[tower], room[tower]) for tower in units}
        for tower in sorted(units, key=lambda name: -room[name]):  # what one tower leaves over goes to the other
            left = total - sum(sizes[name][unit] for name, own in picked.items() for unit in own)
            rest = [unit for unit in orders[tower] if unit not in picked[tower]]
            picked[tower] += fill(rest, sizes[tower], left)
        return picked

    def _expert_size(self, towers: Towers, path: str) -> int:
        layer = towers.model.get_submodule(path)
        assert isinstance(layer, nn.Linear | AdapterLinear)
        return self.config.rank * (layer.in_features + layer.out_features)
