"""The three parts of a LLaVA-style model, and how adapters are put into them."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from mcit_lightning.adapters import AdapterLinear
from mcit_lightning.registry import nearest

logger = logging.getLogger(__name__)

TOWERS = ("vision", "language")
"""Towers that can carry adapters; the projector between them is tuned whole or not at all."""

ALL_LINEAR = "all-linear"
"""Target that stands for every linear of a tower."""

PROJECTOR_NAMES = ("multi_modal_projector", "connector", "merger", "deepstack_merger_list")
"""Attribute names of the projector in the families that transformers has."""


@dataclass
class Towers:
    """Vision tower, projector and language model of a LLaVA-style model, by their paths in it.

    Args:
        model: the model from `AutoModelForImageTextToText`.
        vision: path of the vision tower.
        projector: paths of the projector's modules (Qwen-VL models have them inside the vision tower).
        language: path of the decoder.
    """

    model: PreTrainedModel
    vision: str
    projector: tuple[str, ...]
    language: str
    adapters: dict[str, AdapterLinear] = field(default_factory=dict)
    """Module path -> adapter layer, for all that were attached."""
    sharded: bool = False
    """The decoder's weights are spread over the processes (see `sharding`), so all must run it equally often."""

    @classmethod
    def of(cls, model: PreTrainedModel, projector: str | None = None) -> "Towers":
        """Find the towers by transformers' own `get_encoder("image")` and `get_decoder()`.

        Raises:
            ValueError: the model has no image encoder, or no projector is found under a known or the given name.
        """
        paths = {id(module): path for path, module in model.named_modules()}
        vision = model.get_encoder("image")
        if vision is None or vision is model or id(vision) not in paths:
            raise ValueError(f"backbone.id: {type(model).__name__} has no image encoder; a LLaVA-style model is needed")
        language = paths[id(model.get_decoder())]
        if projector is not None:
            found = tuple(path for path in paths.values() if path == projector)
            if not found:
                top = [path for path in paths.values() if path and path.count(".") < 3]
                raise ValueError(f"backbone.projector: no module {projector!r}. {nearest(projector, top)}")
        else:
            found = tuple(path for path in paths.values() if path.rpartition(".")[2] in PROJECTOR_NAMES)
        if not found:
            known = ", ".join(PROJECTOR_NAMES)
            raise ValueError(
                f"backbone.projector: {type(model).__name__} has no module named {known}; give its dotted path"
            )
        return cls(model, paths[id(vision)], found, language)

    def tower_of(self, path: str) -> str | None:
        """`vision`, `projector` or `language`: the tower that a module or parameter path lies in; None outside of them."""
        if any(_inside(path, root) for root in self.projector):
            return "projector"
        if _inside(path, self.vision):
            return "vision"
        return "language" if _inside(path, self.language) else None

    def targets(self, tower: str, suffixes: Sequence[str]) -> dict[str, str]:
        """Linears of a tower that a target list selects: module path -> the suffix that matched.

        Args:
            tower: `vision` or `language`.
            suffixes: ends of module paths at a dot (`q_proj`, `mlp.fc1`), or `all-linear`.

        Raises:
            ValueError: the tower is unknown, or a suffix matches no linear; names what there is.
        """
        if tower not in TOWERS:
            raise ValueError(f"strategy.targets: unknown tower {tower!r}. {nearest(tower, TOWERS)}")
        linears = [path for path, _ in self.linears(tower)]
        selected: dict[str, str] = {}
        for suffix in suffixes:
            matches = linears if suffix == ALL_LINEAR else [path for path in linears if _inside_end(path, suffix)]
            if not matches:
                ends = {path.rpartition(".")[2] for path in linears} | {ALL_LINEAR}
                raise ValueError(
                    f"strategy.targets.{tower}: {suffix!r} matches no linear of the tower. {nearest(suffix, ends)}"
                )
            for path in matches:
                selected.setdefault(path, path.rpartition(".")[2] if suffix == ALL_LINEAR else suffix)
        return {path: selected[path] for path in linears if path in selected}

    def linears(self, tower: str) -> Iterator[tuple[str, nn.Linear | AdapterLinear]]:
        """Paths and modules of a tower's linears, adapted ones included, in the model's order; the projector's are left out."""
        inside: set[str] = set()
        for path, module in self.model.named_modules():
            if path.rpartition(".")[0] in inside:
                continue  # the base of an adapter layer
            if isinstance(module, AdapterLinear):
                inside.add(path)
            elif not isinstance(module, nn.Linear):
                continue
            if self.tower_of(path) == tower:
                yield path, module

    def attach(self, path: str, *, scale: float, dropout: float = 0.0) -> AdapterLinear:
        """Put an adapter layer around the linear at `path`, or return the one that is there."""
        if path not in self.adapters:
            parent, _, name = path.rpartition(".")
            base = self.model.get_submodule(path)
            assert isinstance(base, nn.Linear), f"{path} is a {type(base).__name__}"
            layer = AdapterLinear(base, scale=scale, dropout=dropout)
            setattr(self.model.get_submodule(parent), name, layer)
            self.adapters[path] = layer
        return self.adapters[path]

    def detach_all(self) -> None:
        """Take every adapter layer out again; the model is the pretrained one, but for a tuned projector."""
        for path, layer in self.adapters.items():
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, layer.base)
        self.adapters.clear()

    @contextmanager
    def pretrained(self) -> Iterator[None]:
        """Context in which the model computes what it did before any adapter was attached (but for a tuned projector)."""
        for layer in self.adapters.values():
            layer.enabled = False
        try:
            yield
        finally:
            for layer in self.adapters.values():
                layer.enabled = True

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Context in which no adapter changes; layers put together once what they would else put together for every token."""
        with ExitStack() as contexts:
            for layer in self.adapters.values():
                contexts.enter_context(layer.keep())
            yield

    def any_process(self, needed: bool) -> bool:
        """Whether the decoder is to run: if this process needs it; where it is sharded, if any does (collective)."""
        if not self.sharded:
            return needed
        flag = torch.tensor(float(needed), device=self.model.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def injection_plan(self) -> list[tuple[str, str, int, int, int]]:
        """What is attached: rows of (tower, target, modules, branches per module, adapter parameters)."""
        modules: Counter[tuple[str, str, int]] = Counter()
        parameters: Counter[tuple[str, str, int]] = Counter()
        for path, layer in self.adapters.items():
            key = (self.tower_of(path) or "", path.rpartition(".")[2], layer.num_gates)
            modules[key] += 1
            parameters[key] += sum(parameter.numel() for _, parameter in layer.adapter_parameters())
        return [(tower, target, modules[key], key[2], parameters[key]) for key in modules for tower, target, _ in [key]]

    def describe(self) -> str:
        """The injection plan as aligned text, one line per tower and target."""
        rows = self.injection_plan()
        lines = [f"{tower:>9}  {target:<12} {count:>4} modules x {branches} branch(es)  {size:>12,} parameters"
                 for tower, target, count, branches, size in rows]  # fmt: skip
        total = sum(row[4] for row in rows)
        return "\n".join(
            [*lines, f"{'total':>9}  {sum(row[2] for row in rows):>17} modules {'':14}  {total:>12,} parameters"]
        )


def find_targets(towers: Towers, targets: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """`Towers.targets` over several towers: module path -> suffix. See there for what is raised."""
    selected: dict[str, str] = {}
    for tower, suffixes in targets.items():
        selected.update(towers.targets(tower, suffixes))
    return selected


def _inside(path: str, root: str) -> bool:
    return path == root or path.startswith(f"{root}.")


def _inside_end(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")
