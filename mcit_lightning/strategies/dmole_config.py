"""Hyper-parameters of D-MoLE."""

from dataclasses import MISSING, dataclass, field, fields
from typing import Literal

from mcit_lightning.allocation import Difficulty
from mcit_lightning.autoencoder import Scaling
from mcit_lightning.features import Tiles
from mcit_lightning.strategies.sequential import LoRAConfig


@dataclass
class DMoLEConfig(LoRAConfig):
    """The defaults are the paper's; what the released code does differently is an option, and named so."""

    dropout: float = 0.05
    targets: dict[str, list[str]] = field(
        default_factory=lambda: {
            "vision": ["q_proj", "k_proj", "v_proj", "out_proj"],
            "language": ["q_proj", "k_proj", "v_proj", "o_proj"],
        }
    )
    """Candidates for experts, per tower: the attention's linears. One tower alone is the paper's ablation v1 or v2."""

    budget: float = 0.5
    """Experts per task, as a share of the candidates."""
    budget_parameters: int | None = None
    """Parameters of a task's experts, instead of `budget`: for comparisons at equal size."""
    unit: Literal["module", "layer"] = "module"
    """What is ranked and allocated: single linears, or all candidates of a layer."""
    allocation: Literal["proxy", "random", "uniform"] = "proxy"
    """Where experts go: to the candidates with the highest gradient norms; to as many random ones; or to all candidates, at a
    rank that is `budget` times `rank`."""
    curriculum: bool = True
    """Split the budget by the difficulty of the modalities; False: by the number of candidates (the ablation v3)."""
    difficulty: Difficulty = "l2"
    """A modality's score; `sum_of_norms` in the released code."""
    vision_floor: float = 0.0
    """Least share of the budget for the vision tower; 0.25 in the released code."""

    proxy_fraction: float = 0.01
    """Share of a task's training samples that the gradient norms are taken over."""
    proxy_minimum: int = 64
    """But at least so many."""
    proxy_bias: bool = False
    """Add the norm of the bias' gradient to a module's score, as the released code does."""
    proxy_passes: int = 1
    """Passes over the sample, each for an equal part of the candidates. Gradients are added up in float32, which takes a copy of
    the part (8.4 GiB for all of LLaVA-1.5-7B's attention); a pass costs a forward, and a backward down to its part."""
    proxy_offload: bool = False
    """Add gradients up in host memory instead; costs a copy per gradient."""
    proxy_accumulate: Literal["float32", "model"] = "float32"
    """`model`: add gradients up in the model's type, bfloat16 in the released code."""
    proxy_loss: Literal["sample", "batch"] = "sample"
    """What is averaged over the sample: each one's mean over its tokens, or each batch's mean over its tokens (released code)."""
    proxy_ranks: Literal["all", "rank_zero"] = "all"
    """`rank_zero`: the other ranks' gradients are thrown away (released code); scores then depend on the number of ranks."""

    router: Literal["autoencoder", "nearest_centroid", "oracle"] = "autoencoder"
    """How a sample's experts are found at evaluation; `oracle` takes the true task, to tell routing errors from anything else."""
    top_k: int = 2
    """Most experts per sample at evaluation."""
    co_expert: Literal["best", "thresholded", "none"] = "best"
    """The earlier expert that helps in training: that of the lowest error, only if under its threshold (released code), or
    none."""
    route_scope: Literal["sample", "batch_vote"] = "sample"
    """`batch_vote`: one decision for the whole batch, by majority (released code). Scores then depend on the batches."""
    vote_share: float = 0.3
    """With `batch_vote`, the share of the votes that a second expert needs."""

    feature_tiles: Tiles = "all"
    """`last`: only the last tile of an image, which is InternVL's thumbnail (released code)."""
    feature_masked: bool = True
    """False: padding takes part in the pooling (released code)."""
    feature_cache: int = 50_000
    """Test samples whose features are kept in host memory, per process: a task is tested again after every later task, and they
    never change (20 KB each for LLaVA-1.5-7B). 0: none."""
    router_fraction: float = 0.01
    """Share of a task's training samples that its router is made from."""
    router_minimum: int = 512
    """But at least so many, or all."""
    router_hidden: int = 128
    """Hidden units of the autoencoder."""
    router_scaling: Scaling = "standardize"
    """What the autoencoder sees; `l2` in the released code."""
    router_output: Literal["linear", "sigmoid"] = "linear"
    """`sigmoid` in the released code."""
    router_epochs: int = 100
    """Passes over the router's samples."""
    router_lr: float = 1.0e-3
    """Adam's learning rate for the autoencoder."""
    router_lr_end: float | None = None
    """Learning rate at the end of a cosine; null: constant. The released code goes from 5e-3 to 1e-3."""
    router_batch_size: int = 64
    """Samples per step of the autoencoder's training."""
    router_patience: int | None = None
    """Stop after so many epochs without progress; 10 in the released code, with up to 1000 epochs."""
    router_keep: Literal["best", "last"] = "best"
    """Weights of the epoch with the lowest training loss, or of the last one (released code)."""
    threshold_from: Literal["held_out", "training"] = "held_out"
    """Errors that set the threshold: of samples that were held out, or of those trained on (released code); those are smaller."""
    router_held_out: float = 0.25
    """Share of the router's samples that only set the threshold."""
    quantile: float = 0.95
    """The threshold is `margin` times this quantile of the reconstruction errors."""
    margin: float = 2.0
    """Factor on the quantile: larger accepts more, of the own task and of others."""

    expert_dtype: Literal["float32", "bfloat16_after_first"] = "float32"
    """Type of the trained parameters. The released code trains the first task's experts in float32 and all later ones, with their
    optimizer's state, in bfloat16, because it casts the model when it resumes."""

    @property
    def needs_scores(self) -> bool:
        """Whether any decision depends on the gradients."""
        return self.allocation == "proxy" or (self.allocation == "random" and self.splits_by_difficulty)

    @property
    def splits_by_difficulty(self) -> bool:
        """Whether there are two towers, and the curriculum splits the budget between them."""
        return self.curriculum and sum(map(bool, self.targets.values())) > 1 and self.allocation != "uniform"

    @property
    def needs_router(self) -> bool:
        """Whether autoencoders or centroids are asked at evaluation or for the co-expert."""
        return self.router != "oracle" or self.co_expert != "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := set(self.targets) - {"vision", "language"}:
            raise ValueError(f"targets: unknown tower {', '.join(sorted(unknown))}; known: vision, language")
        open_shares = ("budget", "proxy_fraction", "router_fraction", "quantile")
        for name in open_shares:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be in (0, 1]")
        for name in ("vision_floor", "vote_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: is {getattr(self, name)}, must be in [0, 1]")
        if not 0 < self.router_held_out < 1:
            raise ValueError(f"router_held_out: is {self.router_held_out}, must be between 0 and 1")
        positive = (
            "top_k proxy_minimum proxy_passes router_minimum router_hidden router_epochs router_batch_size router_lr"
        )
        for name in f"{positive} router_lr_end router_patience margin budget_parameters".split():
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}: is {value}, must be greater than 0")
        if self.feature_cache < 0:
            raise ValueError(f"feature_cache: is {self.feature_cache}, must not be negative")
        if self.router_minimum < 2:
            raise ValueError(f"router_minimum: is {self.router_minimum}, must be at least 2")
        if self.router == "oracle" and self.route_scope == "batch_vote":
            raise ValueError("route_scope: the oracle knows every sample's task; use sample")
        self._refuse_what_has_no_effect()

    def _refuse_what_has_no_effect(self) -> None:
        """An option that another one switches off is a mistake, or a comparison of a run with itself."""
        uniform, towers = self.allocation == "uniform", sum(map(bool, self.targets.values()))
        cases: list[tuple[bool, str, str]] = [
            (uniform, "curriculum vision_floor difficulty unit budget_parameters",
             "uniform allocation puts an expert of rank budget * rank into every candidate"),
            (towers < 2, "vision_floor difficulty", "targets name one tower, so the budget is not split"),
            (not self.curriculum, "difficulty", "without the curriculum the budget is split by the number of candidates"),
            (self.budget_parameters is not None, "budget", "budget_parameters sets the budget; give one of the two"),
            (not self.needs_scores, _names("proxy_"), "no decision depends on the gradients"),
            (self.route_scope == "sample", "vote_share", "nothing is voted on; it belongs to route_scope: batch_vote"),
            (self.route_scope == "batch_vote", "top_k", "a vote switches on the first and at most a second task"),
            (self.router == "oracle", "top_k", "the oracle takes the sample's own task"),
            (self.router == "nearest_centroid",
             "router_hidden router_output router_epochs router_lr router_lr_end router_batch_size router_patience router_keep",
             "a centroid is not trained"),
            (self.threshold_from == "training", "router_held_out", "nothing is held out; it belongs to threshold_from: held_out"),
            (not self.needs_router, f"{_names('router_')} feature_tiles feature_masked threshold_from quantile margin",
             "the oracle without a co-expert asks no router"),
        ]  # fmt: skip
        defaults = {item.name: item.default for item in fields(self) if item.default is not MISSING}
        for applies, names, reason in cases:
            for name in names.split():
                if applies and (value := getattr(self, name)) != defaults[name]:
                    default = "null" if defaults[name] is None else defaults[name]
                    raise ValueError(f"{name}: is {value}, which has no effect: {reason}; leave it at {default}")


def _names(prefix: str) -> str:
    return " ".join(item.name for item in fields(DMoLEConfig) if item.name.startswith(prefix))
