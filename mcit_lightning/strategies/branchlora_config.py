"""Hyper-parameters of BranchLoRA (Zhang et al., ACL 2025)."""

from dataclasses import dataclass
from typing import Literal

from mcit_lightning.gates import GateInput
from mcit_lightning.strategies.moelora import MoELoRAConfig
from mcit_lightning.strategies.sequential import LoRAConfig


@dataclass
class BranchLoRAConfig(MoELoRAConfig):
    """The method's parts can be switched off one by one, which gives the paper's ablation down to MoELoRA.

    The projector trains with the adapters, as in the paper; `backbone.train_projector: false` freezes it,
    `optim.projector_lr` gives it its own rate, and `projector` a copy for each task. It is the largest source of forgetting.
    """

    branch_rank: int | None = None
    """Rank of the trunk and of every branch; null: rank / experts, which the published parameter counts come from."""
    scale_by: Literal["rank", "branch_rank"] = "rank"
    """The adapter's output is scaled by alpha over this. `branch_rank` makes it `experts` times larger, which needs a learning
    rate that much smaller."""
    shared_trunk: bool = True
    """One A per module for all branches; False gives every branch its own."""
    top_k: int | None = 2
    """Branches per sample; null mixes all of them."""
    renormalize_top_k: bool = True
    """The gates of the chosen branches sum to one: softmax over the top k, which is the same as a softmax over all, masked and
    renormalised. False masks without renormalising; top_k: 1 needs that."""
    gate_input: GateInput = "first"
    """What the router reads. In a causal decoder the `first` token's state does not depend on the sample: the gate is then
    constant per task and module. `mean` and `last` (of the prompt) and `token` route by content."""
    normalize_gate_input: bool = True
    """Divide the router's input by its root mean square; the first token's activations are extreme."""
    router_noise: float = 0.7
    """Standard deviation of the noise on the logits in training; without it the choice stays where it was initialised."""
    router_init: Literal["kaiming", "zeros", "previous"] = "kaiming"
    """How a task's router starts: at random, at zero (the noise then chooses), or as a copy of the previous task's."""
    freeze_branches: bool = True
    """After a task, freeze the branches of each module that it used most."""
    freeze_count: int | None = None
    """How many freeze per task and module; null: top_k."""
    freeze_by: Literal["count", "mass"] = "count"
    """What most used means: how often a branch was chosen, or the sum of its gates. The other one decides between equals."""
    freeze_only_tunable: bool = False
    """Choose among branches that are not frozen yet; by default an already frozen one may be chosen again."""
    grow_exhausted: int = 0
    """Branches that a module gets before a task if all that it has are frozen; 0: none, its trunk and router train on."""
    freeze_trunk_after: int | None = None
    """Freeze A after that many tasks; null: it trains on."""
    task_routers: bool = True
    """A router per task, and a selector that finds it at evaluation; False: one router for all tasks."""
    selector: Literal["keys", "learned_keys", "oracle"] = "keys"
    """How a sample's task is found: keys that are means of unit embeddings, keys trained by the alignment loss (they need an
    `optim.strategy_lr` of about 1e-2 to turn in a few hundred steps), or the true task (to tell routing errors from drift)."""
    alignment_weight: float = 1.0
    """lambda of the alignment loss, for learned keys."""
    key_encoder: str | None = None
    """Folder or hub name of a CLIP model whose image and text embeddings the keys are made of; null: the model's own vision
    tower and input embeddings, which needs a backbone that does not pack the patches of several images."""
    min_similarity: float | None = None
    """Cosine to the best key, averaged over a sample's image and text, below which no adapter answers; null: the best task
    always does."""

    projector: Literal["shared", "per_task"] = "shared"
    """`per_task`: a task starts from the previous one's projector, which is kept for that task's samples."""
    route_scope: Literal["sample", "batch_vote"] = "sample"
    """`batch_vote`: the whole batch goes to the task that most of its samples are most similar to. Scores then depend on the
    batches."""

    def __post_init__(self) -> None:
        if self.branch_rank is None:
            super().__post_init__()
        else:  # the total rank does not need to be divisible
            LoRAConfig.__post_init__(self)
            if self.branch_rank < 1 or self.experts < 1:
                raise ValueError(
                    f"branch_rank: is {self.branch_rank} with {self.experts} experts, both must be at least 1"
                )
        if self.top_k is not None and not 1 <= self.top_k <= self.experts:
            raise ValueError(f"top_k: is {self.top_k}, must be between 1 and experts ({self.experts}), or null for all")
        if not self.renormalize_top_k and self.top_k in (None, self.experts):
            raise ValueError(
                f"renormalize_top_k: false has no effect where all branches are mixed (top_k: {self.top_k}); leave it true"
            )
        if self.top_k == 1 and self.renormalize_top_k:
            raise ValueError(
                "top_k: with 1 the softmax over the chosen branch is always 1 and the router gets no gradient; use 2, or "
                "renormalize_top_k: false"
            )
        if set(self.targets) - {"language"}:
            raise ValueError(f"targets: BranchLoRA routes tokens of the language model; got {sorted(self.targets)}")
        self._check_routers()
        self._check_freezing()
        self._check_selector()

    def _check_routers(self) -> None:
        if self.router_noise < 0:
            raise ValueError(f"router_noise: is {self.router_noise}, must not be negative")
        if self.router_init == "zeros" and self.router_noise == 0 and self.top_k not in (None, self.experts):
            raise ValueError(
                "router_init: with 'zeros' and router_noise: 0 all branches tie and the same ones are always chosen; set "
                "router_noise above 0, or router_init: kaiming"
            )
        if self.router_init == "previous" and not self.task_routers:
            raise ValueError("router_init: 'previous' needs task_routers: true; with one router there is none to copy")

    def _check_freezing(self) -> None:
        if self.freeze_branches and self.top_k is None and self.freeze_count is None:
            raise ValueError("freeze_count: is needed when top_k is null and freeze_branches is true")
        if self.freeze_count is not None and not 1 <= self.freeze_count <= self.experts:
            raise ValueError(
                f"freeze_count: is {self.freeze_count}, must be between 1 and experts ({self.experts}); to freeze none, set "
                "freeze_branches: false"
            )
        if not self.freeze_branches:
            changed = {"freeze_count": None, "freeze_by": "count", "freeze_only_tunable": False, "grow_exhausted": 0}
            for key, default in changed.items():
                if getattr(self, key) != default:
                    raise ValueError(
                        f"{key}: is {getattr(self, key)!r}, but freeze_branches is false, so none ever freezes"
                    )
        if self.grow_exhausted < 0:
            raise ValueError(f"grow_exhausted: is {self.grow_exhausted}, must not be negative")
        if self.grow_exhausted and not self.task_routers:
            raise ValueError(
                "grow_exhausted: needs task_routers: true; a router for all tasks cannot choose a new branch"
            )
        if self.freeze_trunk_after is not None and self.freeze_trunk_after < 0:
            raise ValueError(f"freeze_trunk_after: is {self.freeze_trunk_after}, must not be negative")

    def _check_selector(self) -> None:
        if self.alignment_weight < 0:
            raise ValueError(f"alignment_weight: is {self.alignment_weight}, must not be negative")
        if self.selector == "learned_keys" and self.alignment_weight == 0:
            raise ValueError(
                "alignment_weight: with 0 the learned keys never move and all samples go to the first task"
            )
        if self.selector != "learned_keys" and self.alignment_weight != 1:
            raise ValueError(
                f"alignment_weight: is {self.alignment_weight}, but only selector: learned_keys trains keys by a loss"
            )
        if self.min_similarity is not None and not -1 <= self.min_similarity <= 1:
            raise ValueError(f"min_similarity: is {self.min_similarity}, must be a cosine, in [-1, 1], or null")
        if self.projector == "per_task" and not self.task_routers:
            raise ValueError("projector: 'per_task' needs task_routers: true, whose selector finds the task")
        if self.selector != "keys" and not self.task_routers:
            raise ValueError(f"selector: {self.selector!r} needs task_routers: true; one router has nothing to select")
        if self.min_similarity is not None and self.route_scope == "batch_vote":
            raise ValueError(
                "route_scope: 'batch_vote' has no place for samples without a task; leave min_similarity null"
            )
        unused = {"key_encoder": None, "min_similarity": None, "route_scope": "sample"}
        for key, default in unused.items():
            if getattr(self, key) != default and (self.selector == "oracle" or not self.task_routers):
                raise ValueError(
                    f"{key}: is {getattr(self, key)!r}, but there are no keys with "
                    + ("selector: oracle" if self.task_routers else "task_routers: false")
                )
