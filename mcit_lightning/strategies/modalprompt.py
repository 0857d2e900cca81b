"""ModalPrompt (Zeng et al., EMNLP 2025): prompts in the decoder's input, chosen for a sample by its image and its question."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcit_lightning.data.sampler import derive_seed
from mcit_lightning.key_encoders import Embeddings
from mcit_lightning.loss import Batch, LossOutput, answer_loss
from mcit_lightning.plans import TaskPlan
from mcit_lightning.soft_prompts import SoftPrompts
from mcit_lightning.stages import Stage
from mcit_lightning.strategies.base import STRATEGIES, StrategyConfig
from mcit_lightning.strategies.key_encoded import KeyEncoded
from mcit_lightning.towers import Towers


@dataclass
class ModalPromptConfig(StrategyConfig):
    """The values of the released code. There is no LoRA, hence no `rank`, `alpha`, `dropout` and `targets`."""

    length: int = 10
    """Vectors of a task's prompt; they come on top of `data.max_length`."""
    top_k: int = 3
    """Prompts that a sample gets: at evaluation the most similar tasks', in training the task's own and the most similar earlier
    ones'. The copy of the method in MCITlib has 1."""
    image_weight: float = 0.5
    """Of the image's similarity; the question's has the rest. A sample without an image is compared by its question alone."""
    key_encoder: str | None = None
    """A CLIP checkpoint for image and question, as in the paper (`openai/clip-vit-large-patch14-336`); null takes the model's own
    vision tower and input embeddings."""

    def __post_init__(self) -> None:
        for key in ("length", "top_k"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key}: is {getattr(self, key)}, must be at least 1")
        if not 0 <= self.image_weight <= 1:
            raise ValueError(f"image_weight: is {self.image_weight}, must be in [0, 1]")


class TaskPrompt(nn.Module):
    """A task's prompt, and what turns it into the task's prototype.

    Args:
        vectors: [P, d], where the prompt starts.
        width: of the prototype.
        generator: draws the transform's weights, on the CPU.
    """

    def __init__(self, vectors: Tensor, width: int, generator: torch.Generator) -> None:
        super().__init__()
        dim = vectors.shape[1]
        self.vectors = nn.Parameter(vectors)
        self.transform = nn.Sequential(_linear(dim, dim, generator), nn.SiLU(), _linear(dim, width, generator))

    def prototype(self) -> Tensor:
        """[width], the mean over the transformed vectors."""
        mean: Tensor = self.transform(self.vectors).mean(0)
        return mean


@STRATEGIES.register("modalprompt")
class ModalPrompt(KeyEncoded):
    """A prompt of a few vectors per task in the decoder's input; a sample gets those of the tasks that it is most similar to.

    With the prompt P_t and the transform f_t of task t, all of whose vectors stand behind the first token:

        z_t = mean f_t(P_t),    s_t(x) = lambda cos(e_img, z_t) + (1 - lambda) cos(e_txt, z_t)
        training:   [earlier prompts of the largest s ; P_t],    L + (1 - cos(e_img, z_t)) + (1 - cos(e_txt, z_t))
        evaluation: [prompts of the largest s],                  the most similar one nearest to the question

    P_t and f_t train, all earlier ones and the model stay as they are. Written after the released code; `docs/strategies.md` says
    where it departs from it.
    """

    Config = ModalPromptConfig
    config: ModalPromptConfig

    def __init__(self, config: ModalPromptConfig) -> None:
        super().__init__(config)
        self.prompts = nn.ModuleDict()
        self._soft: SoftPrompts | None = None
        self._chosen: Tensor | None = None
        self._alignment: dict[str, Tensor] = {}

    def plan(self, stage: Stage, towers: Towers) -> TaskPlan:
        """The stage's prompt."""
        return TaskPlan(stage.name, extra={"prompt_length": self.config.length})

    def grow(self, towers: Towers, plan: TaskPlan) -> None:
        """The stage's prompt, made of the embeddings of random tokens, and its transform."""
        if plan.stage in self.prompts:
            return
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "modalprompt", plan.stage))
        table: Tensor = towers.model.get_input_embeddings().weight  # type: ignore[assignment]
        tokens = torch.randint(len(table), (plan.extra["prompt_length"],), generator=generator)
        vectors = table.detach()[tokens.to(table.device)].float()
        prompt = TaskPrompt(vectors, sum(self._widths(towers)), generator)
        self.prompts[plan.stage] = prompt.to(table.device)

    def trainable(self, towers: Towers, stage: Stage) -> Iterator[nn.Parameter]:
        """The stage's prompt and transform."""
        yield from self.prompts[stage.name].parameters()

    def routing(self, towers: Towers, batch: Batch, task: str | None) -> AbstractContextManager[None]:
        """Training: the stage's prompt behind the most similar earlier ones. Evaluation: the most similar ones."""
        self._soft, self._chosen, self._alignment = None, None, {}
        if not self.prompts:  # before any training: what the first training step would stumble over
            self.key_encoder().check(towers, batch)
            return nullcontext()
        embeddings = self.key_encoder().embed(towers, batch)
        image, text = self.cosines(towers, embeddings)
        weight = self.config.image_weight * embeddings.has_image.unsqueeze(1)
        scores = (weight * image + (1 - weight) * text).detach()
        if task is None:
            self._chosen = best = _best(scores, self.config.top_k)
        else:
            own = list(self.prompts).index(task)
            self._alignment = {
                "image_alignment": ((1 - image[:, own]) * embeddings.has_image).mean(),
                "text_alignment": (1 - text[:, own]).mean(),
            }
            best = F.pad(_best(scores[:, :own], self.config.top_k - 1), (1, 0), value=own)
        table = torch.stack([prompt.vectors for prompt in self.prompts.values()])  # type: ignore[misc]
        vectors = table[best.flip(1)].flatten(1, 2)
        self._soft = SoftPrompts.behind_first_token(towers, batch, vectors)
        return self._soft.placed(towers, batch["inputs"]["input_ids"].shape[1] + vectors.shape[1])

    def cosines(self, towers: Towers, embeddings: Embeddings) -> tuple[Tensor, Tensor]:
        """[B, T] twice, in float32: cosine of the image and of the question to each task's prototype."""
        widths = self._widths(towers)
        with torch.autocast(embeddings.text.device.type, enabled=False):
            prototypes = torch.stack([prompt.prototype() for prompt in self.prompts.values()]).float()  # type: ignore[operator]
            of_image, of_text = prototypes.split(widths, 1) if len(widths) == 2 else (prototypes, prototypes)
            return (
                F.cosine_similarity(embeddings.image.unsqueeze(1), of_image, dim=2),
                F.cosine_similarity(embeddings.text.unsqueeze(1), of_text, dim=2),
            )

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """With room for the prompts."""
        return super().inputs(batch if self._soft is None else self._soft.extend(batch))

    def loss(self, model: nn.Module, batch: Batch, stage: Stage) -> LossOutput:
        """Cross-entropy on the answers, and how far the stage's prototype is from the batch's images and questions."""
        assert self._soft is not None, "the strategy's routing context was not entered"
        output = answer_loss(model, self._soft.extend(batch))  # type: ignore[arg-type]
        return LossOutput(output.loss + sum(self._alignment.values()), {"answer": output.loss, **self._alignment})

    def routed_to(self) -> list[list[str]] | None:
        """The tasks whose prompts a sample got, the most similar first."""
        names = list(self.prompts)
        return None if self._chosen is None else [[names[index] for index in row] for row in self._chosen.tolist()]

    def _widths(self, towers: Towers) -> list[int]:
        """Widths of a prototype's parts: one for both modalities in CLIP's space, else one for each."""
        image, text = self.key_encoder().widths(towers)
        return [image, text] if self.config.key_encoder is None else [image]


def _best(scores: Tensor, count: int) -> Tensor:
    """[B, k], indices of the `count` largest scores of every row, best first; all of them if there are not as many."""
    return scores.argsort(dim=1, descending=True, stable=True)[:, :count]


def _linear(inputs: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """With PyTorch's usual initial values, drawn from the generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, inputs, outputs)
    bound = inputs**-0.5
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -bound, bound, generator=generator)
    return layer
