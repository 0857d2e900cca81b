"""Which task a sample belongs to, without its task id: similarity to one image key and one text key per task.

BranchLoRA (Zhang et al., ACL 2025): t* = argmax_t [cos(e_img, k_img^t) + cos(e_txt, k_txt^t)], and keys that minimise
sum_n (1 - cos(e(n), k^t)). With frozen encoders the minimiser has a closed form, the direction of the mean unit embedding, so
keys are running sums of unit embeddings by default.

Shapes: B samples, T tasks, d_img and d_txt the widths of the embeddings.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "TaskSelector":
        """Move with the model, but stay in float32: a sum of some hundred unit vectors no longer grows in bfloat16."""
        super()._apply(fn, recurse)
        for key in self.parameters():
            key.data = key.data.float()
        return self

    def add_task(self, task: str, image_width: int, text_width: int, device: torch.device) -> None:
        """Make the keys of a task. A task that is there is left as it is.

        Sums start at zero. Learned keys start at a constant vector, because the cosine has no gradient at zero, and at length
        one: the longer a key, the more steps it takes to turn it.
        """
        if task not in self.tasks:
            self.tasks.append(task)
            for table, width in ((self.image_keys, image_width), (self.text_keys, text_width)):
                start = width**-0.5 if self.learned else 0.0
                table[task] = nn.Parameter(torch.full((width,), start, device=device), requires_grad=self.learned)

    def update(self, task: str, image: Tensor, has_image: Tensor, text: Tensor) -> None:
        """Add a batch of unit embeddings, of all ranks, to the task's running sums. Collective.

        Args:
            image: [B, d_img]; rows without an image are zero.
            has_image: [B], 1 where the sample has an image.
            text: [B, d_txt].
        """
        with torch.no_grad():
            image_sum = (F.normalize(image, dim=-1) * has_image.unsqueeze(1)).sum(0)
            sums = torch.cat([image_sum, F.normalize(text, dim=-1).sum(0)])
            if torch.distributed.is_initialized():  # every step, so that a checkpoint of any rank holds the sums of all
                torch.distributed.all_reduce(sums)
            self.image_keys[task] += sums[: len(image_sum)]
            self.text_keys[task] += sums[len(image_sum) :]

    def alignment_loss(self, task: str, image: Tensor, has_image: Tensor, text: Tensor) -> Tensor:
        """Mean over the batch of (1 - cos) to the task's image key and text key; arguments as for `update`."""
        image_term = (1 - F.cosine_similarity(image, self.image_keys[task], dim=-1)) * has_image
        text_term = 1 - F.cosine_similarity(text, self.text_keys[task], dim=-1)
        return (image_term + text_term).mean()

    def scores(self, image: Tensor, has_image: Tensor, text: Tensor) -> Tensor:
        """[B, T], sum of the cosine similarities; for a sample without an image the text term alone.

        Always in float32: keys of related tasks differ by less than bfloat16 can tell.
        """
        with torch.autocast(text.device.type, enabled=False):
            image_keys = F.normalize(torch.stack(list(self.image_keys.values())).float(), dim=-1)
            text_keys = F.normalize(torch.stack(list(self.text_keys.values())).float(), dim=-1)
            image_score = F.normalize(image.float(), dim=-1) @ image_keys.T * has_image.unsqueeze(1)
            return image_score + F.normalize(text.float(), dim=-1) @ text_keys.T

    def choose(
        self, image: Tensor, has_image: Tensor, text: Tensor, *, min_similarity: float | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The task of each sample, as an index into `tasks`.

        Args:
            min_similarity: smallest cosine, averaged over the sample's image and text, at which a task counts as found.

        Returns:
            index [B], and [B] with 1 where a task was found and 0 where none is similar enough; None if all count.
        """
        best = self.scores(image, has_image, text).max(1)
        if min_similarity is None:
            return best.indices, None
        return best.indices, (best.values / (1 + has_image) >= min_similarity).float()
