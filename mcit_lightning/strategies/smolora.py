"""SMoLoRA (Wang et al., ICCV 2025): experts for what is seen and experts for what is asked, each group with its own router."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from mcit_lightning.data.collate import SampleReader
from mcit_lightning.features import feature_width
from mcit_lightning.key_encoders import mean_text
from mcit_lightning.loss import Batch, prompt_mask
from mcit_lightning.plans import TaskPlan
from mcit_lightning.sentence_encoder import SentenceEncoder
from mcit_lightning.separable import FUSION, INSTRUCTION, VISUAL, AdaptiveFusion, SeparableGate, SeparableState
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.moelora import MoELoRA, MoELoRAConfig
from mcit_lightning.towers import Towers


@dataclass
class SMoLoRAConfig(MoELoRAConfig):
    """As in the paper, but for the total rank: its 8 experts of rank 16 are rank 128 with alpha 256."""

    experts: int = 8
    """N, half of them for visual understanding and half for instruction following; each has rank `rank / experts`."""
    targets: dict[str, list[str]] = field(default_factory=lambda: {"language": ["gate_proj", "up_proj", "down_proj"]})
    """Ends of the paths of the language model's linears that get the experts; the paper has them in the feed-forward blocks."""
    top_k: int = 1
    """Experts of each half per sample. With 1, as published, routers get no gradient and keep their random initial values."""
    freeze_routers: bool = False
    """Train the routers in the first stage only, as the released code does; without effect for `top_k: 1`, and refused there."""
    instruction_encoder: str | None = None
    """Folder or hub name of a sentence encoder, as in the paper (`sentence-transformers/all-MiniLM-L6-v2`); null: the mean of the
    model's own input embeddings over the prompt's text."""
    instructions: list[str] = field(default_factory=list)
    """Texts that the sentence encoder is to read apart from the question: a sample's instruction is the longest of them that its
    question contains, or the question itself if it contains none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.experts % 2:
            raise ValueError(f"experts: is {self.experts}, must be even; half of them follow instructions")
        if not 1 <= self.top_k <= self.experts // 2:
            raise ValueError(f"top_k: is {self.top_k}, must be between 1 and half of the experts ({self.experts // 2})")
        if self.freeze_routers and self.top_k == 1:
            raise ValueError("freeze_routers: has no effect with top_k: 1, where routers never train; leave it false")
        if set(self.targets) - {"language"}:
            raise ValueError(f"targets: SMoLoRA adapts the language model alone; got {sorted(self.targets)}")
        if self.instructions and self.instruction_encoder is None:
            raise ValueError(
                "instructions: need an instruction_encoder that reads them apart from the question, for example "
                "sentence-transformers/all-MiniLM-L6-v2; without one leave the list empty"
            )
        if not all(text.strip() for text in self.instructions):
            raise ValueError("instructions: must not hold an empty text, which every question contains")


@STRATEGIES.register("smolora")
class SMoLoRA(MoELoRA):
    """Two groups of N / 2 LoRA experts in every target, each with a router of its own, fused token by token.

        y = W0 x + alpha y_vu + beta y_if,    y_vu = (a / r) sum_{i <= N/2} G_vu,i B_i A_i x,    y_if = the same over the others
        G_vu = softmax(top_k(R_vu Avg(x))),    G_if = softmax(top_k(R_if f(instruction)))
        [alpha, beta] = softmax([I_vu y_vu, I_if y_if])

    Avg is the mean over the prompt, f a frozen embedding of the sample's instruction. Experts and I train through all tasks.
    """

    Config = SMoLoRAConfig
    config: SMoLoRAConfig
    _encoder: SentenceEncoder | None = None

    def check(self, towers: Towers, stages: list[Stage]) -> None:
        """Look for the targets, and load the sentence encoder. Raises ValueError where one of them is not there."""
        super().check(towers, stages)
        self.sentence_encoder()

    def sentence_encoder(self) -> SentenceEncoder | None:
        """What embeds instructions, loaded at the first call; None for the model's own input embeddings.

        Raises:
            ValueError: `instruction_encoder` names no encoder.
        """
        name = self.config.instruction_encoder
        if self._encoder is None and name is not None:
            self._encoder = SentenceEncoder(name, self.config.instructions)
        return self._encoder

    def sample_reader(self) -> SampleReader | None:
        """What the sentence encoder wants to know of the samples."""
        encoder = self.sentence_encoder()
        return None if encoder is None else encoder.reader

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """Attach the planned experts, their two routers and what fuses them."""
        encoder, half = self.sentence_encoder(), self.config.experts // 2
        width = feature_width(towers)[1] if encoder is None else encoder.width
        for path in plan.ranks:
            layer = towers.attach(path, scale=self.scale, dropout=self.config.dropout)
            self.add_experts(layer, path)
            layer.add_router(VISUAL, seed=self.seed, path=path, shape=(half, layer.in_features))
            layer.add_router(INSTRUCTION, seed=self.seed, path=path, shape=(half, width))
            layer.add_router(FUSION, seed=self.seed, path=path, shape=(2, layer.out_features))
            layer.gate = SeparableGate(path, layer, self.config.top_k)
            layer.fusion = AdaptiveFusion(layer.gate)

    def trainable(self, towers: Towers, stage: Stage) -> Iterator[nn.Parameter]:
        """All experts and what fuses them; the routers where they get gradients."""
        routed = self.config.top_k > 1 and not (self.config.freeze_routers and stage.index > 0)
        for layer in towers.adapters.values():
            yield from layer.lora_a.values()
            yield from layer.lora_b.values()
            yield layer.routers[FUSION]
            if routed:
                yield from (layer.routers[VISUAL], layer.routers[INSTRUCTION])

    def gate_state(self, towers: Towers, batch: Batch, task: str | None) -> SeparableState:
        """The prompts, and the embeddings of their instructions."""
        instruction = self.embed(towers, batch) if towers.adapters else None
        return SeparableState(mask=prompt_mask(batch), instruction=instruction, generating=task is None)

    def embed(self, towers: Towers, batch: Batch) -> Tensor:
        """[B, e] in float32, the samples' instructions; a sample's own does not depend on the rest of the batch."""
        encoder = self.sentence_encoder()
        return mean_text(towers, batch) if encoder is None else encoder.embed(batch)
