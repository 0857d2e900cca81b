"""Which task a sample belongs to, without its task id: similarity to one image key and one text key per task.

BranchLoRA (Zhang et al., ACL 2025): t* = argmax_t [cos(e_img, k_img^t) + cos(e_txt, k_txt^t)], and keys that minimise
sum_n (1 - cos(e(n), k^t)). With frozen encoders the minimiser has a closed form, the direction of the mean unit embedding, so
keys are running sums of unit embeddings by default.

Shapes: B samples, T tasks, d_img and d_txt the widths of the embeddings.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcit_lightning.loss import Batch, prompt_mask
from mcit_lightning.towers import Towers


class TaskSelector(nn.Module):
    """Keys of the tasks learnt so far.

    Args:
        learned: keys are parameters trained by the alignment loss instead of running sums.
    """

    def __init__(self, *, learned: bool = False) -> None:
        super().__init__()
        self.learned = learned
        self.tasks: list[str] = []
        self.image_keys = nn.ParameterDict()
        self.text_keys = nn.ParameterDict()

    def add_task(self, task: str, image_width: int, text_width: int, device: torch.device) -> None:
        """Make the keys of a task. A task that is there is left as it is.

        Sums start at zero; learned keys at a constant vector, because the cosine has no gradient at zero.
        """
        if task not in self.tasks:
            self.tasks.append(task)
            start = 1.0 if self.learned else 0.0
            for table, width in ((self.image_keys, image_width), (self.text_keys, text_width)):
                table[task] = nn.Parameter(torch.full((width,), start, device=device), requires_grad=self.learned)

    def update(self, task: str, image: Tensor, has_image: Tensor, text: Tensor) -> None:
        """Add a batch of unit embeddings, of all ranks, to the task's running sums. Collective.

        Args:
            image: [B, d_img]; rows without an image are zero.
            has_image: [B], 1 where the sample has an image.
            text: [B, d_txt].
        """
        sums = [(F.normalize(image, dim=-1) * has_image.unsqueeze(1)).sum(0), F.normalize(text, dim=-1).sum(0)]
        if torch.distributed.is_initialized():  # every step, so that a checkpoint of any rank holds the sums of all
            for value in sums:
                torch.distributed.all_reduce(value)
        with torch.no_grad():
            self.image_keys[task] += sums[0]
            self.text_keys[task] += sums[1]

    def alignment_loss(self, task: str, image: Tensor, has_image: Tensor, text: Tensor) -> Tensor:
        """Mean over the batch of (1 - cos) to the task's image key and text key; arguments as for `update`."""
        image_term = (1 - F.cosine_similarity(image, self.image_keys[task], dim=-1)) * has_image
        text_term = 1 - F.cosine_similarity(text, self.text_keys[task], dim=-1)
        return (image_term + text_term).mean()

    def scores(self, image: Tensor, has_image: Tensor, text: Tensor) -> Tensor:
        """[B, T], sum of the cosine similarities; for a sample without an image the text term alone."""
        image_keys = F.normalize(torch.stack(list(self.image_keys.values())), dim=-1)
        text_keys = F.normalize(torch.stack(list(self.text_keys.values())), dim=-1)
        image_score = F.normalize(image, dim=-1) @ image_keys.T * has_image.unsqueeze(1)
        return image_score + F.normalize(text, dim=-1) @ text_keys.T


@torch.no_grad()
def embed(towers: Towers, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Frozen embeddings of a batch's samples, from the model's own vision tower and input embeddings.

    The image embedding is the mean over the vision tower's tokens (and over a sample's images), the text embedding the mean
    of the decoder's input embeddings over the prompt's text tokens. Both are float32 and do not depend on the rest of the batch.

    Returns:
        image [B, d_img] (zero without an image), has_image [B], text [B, d_txt].

    Raises:
        NotImplementedError: the vision tower takes more than `pixel_values`, or does not give one output per image.
    """
    inputs = batch["inputs"]
    ids: Tensor = inputs["input_ids"]
    image_token = towers.model.config.image_token_id
    is_text = (prompt_mask(batch) * (ids != image_token)).float().unsqueeze(-1)
    embeddings = towers.model.get_input_embeddings()(ids).float()
    text = (embeddings * is_text).sum(1) / is_text.sum(1).clamp(min=1)
    counts = torch.tensor(batch["num_images"], device=ids.device)
    vision = towers.model.get_submodule(towers.vision)
    width = towers.model.config.vision_config.hidden_size
    image = torch.zeros(len(counts), width, device=ids.device)
    if any(batch["num_images"]):
        pixels: Tensor = inputs["pixel_values"]
        if pixels.dim() != 4 or pixels.shape[0] != sum(batch["num_images"]):
            raise NotImplementedError(
                "strategy.selector: keys from the model's own vision tower need one picture per image; "
                f"{type(towers.model).__name__} cuts images into tiles or patches. Use selector: oracle"
            )
        hidden = vision(pixels.to(next(vision.parameters()).dtype)).last_hidden_state.float().mean(1)
        owner = torch.arange(len(counts), device=ids.device).repeat_interleave(
            counts, output_size=sum(batch["num_images"])
        )
        image = image.index_add(0, owner, hidden) / counts.clamp(min=1).unsqueeze(1)
    return image, (counts > 0).float(), text
