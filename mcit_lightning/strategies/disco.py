"""DISCO (Guo et al., ICCV 2025) for one client: a LoRA per task, activated by how similar the question is to the task's."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from mcit_lightning.loss import Batch
from mcit_lightning.plans import TaskPlan
from mcit_lightning.routes import SampleGate
from mcit_lightning.strategies.base import STRATEGIES
from mcit_lightning.strategies.keyed_lora import KeyedTaskLoRA
from mcit_lightning.strategies.sequential import LoRAConfig
from mcit_lightning.towers import Towers


@dataclass
class DISCOConfig(LoRAConfig):
    """The values of the released code."""

    temperature: float = 0.05
    """Of the softmax over the tasks' similarities."""
    use_image: bool = False
    """Compare the image too, and take the mean of both similarities; the released code computes that and leaves it out."""
    key_encoder: str | None = None
    """A CLIP checkpoint for the question, as in the paper (`openai/clip-vit-large-patch14-336`); null takes the model's own input
    embeddings."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature <= 0:
            raise ValueError(f"temperature: is {self.temperature}, must be greater than 0")
        if set(self.targets) - {"language"}:
            raise ValueError(f"targets: DISCO adapts the language model alone; got {sorted(self.targets)}")


@STRATEGIES.register("disco")
class DISCO(KeyedTaskLoRA):
    """Training: the task's own LoRA. Evaluation, in every layer and for a sample x (subspace selective activation):

        y = W0 x + s sum_i w_i B_i A_i x,    w = softmax_i(cos(e_txt, k_txt^i) / tau)

    The keys k are the means of the embeddings of a task's questions. Written after the form for central training that the authors
    publish in MCITlib. Left out: the federated part. Its dynamic knowledge organisation finds out which task a client's LoRA
    belongs to, which a stream with task boundaries says by itself. As in `hide`, keys start empty, are means of embeddings of
    unit length, and a sample's weights are its own and not those of its batch's mean.
    """

    Config = DISCOConfig
    config: DISCOConfig

    def __init__(self, config: DISCOConfig) -> None:
        super().__init__(config)
        self._weights: Tensor | None = None

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The stage's LoRA and keys; with the first one, the gates."""
        super().grow(towers, plan)
        for layer in towers.adapters.values():
            layer.gate = layer.gate if isinstance(layer.gate, SampleGate) else SampleGate()

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Training: the stage's branch. Evaluation: all branches, by the sample's similarities."""
        self._weights = None
        tasks = self.selector.tasks
        if not tasks:  # before any training: what the first training step would stumble over
            self.key_encoder().check(towers, batch)
            return nullcontext()
        if task is None:
            scores = self.similarities(towers, batch, question_only=not self.config.use_image)
            gate = self._weights = (scores / self.config.temperature).softmax(1)
        else:
            self.collect(towers, batch, task)
            own = torch.tensor([float(name == task) for name in tasks], device=batch["inputs"]["input_ids"].device)
            gate = own.expand(len(batch["id"]), -1)
        for layer in towers.adapters.values():
            assert isinstance(layer.gate, SampleGate)
            layer.gate.value = gate
        return nullcontext()

    def routed_to(self) -> list[list[str]] | None:
        """All learnt tasks, by the weight of their LoRAs."""
        return None if self._weights is None else self.ranked_tasks(self._weights)
