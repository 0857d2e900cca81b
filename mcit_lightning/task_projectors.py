"""A projector per task: earlier tasks' projectors are kept, and at evaluation each picture goes through its sample's.

Shapes: B samples, N pictures or tiles, T tasks.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mcit_lightning.towers import Towers


class TaskProjectors(nn.Module):
    """The projectors of all tasks but the last, whose is the model's own.

    `keep` files the model's projector under the task that it was trained for, before the next one starts from it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kept = nn.ModuleDict()
        self._hooked: set[str] = set()
        self._choice: Tensor | None = None  # [N], each picture's index into the tasks
        self._inside = False

    def keep(self, task: str, towers: Towers) -> None:
        """Copy the model's projector as a task's own. A task that has one keeps it."""
        for path in towers.projector:
            if path not in self._hooked:
                self._hooked.add(path)
                towers.model.get_submodule(path).register_forward_hook(self._hook(path), with_kwargs=True)
        if task not in self.kept:
            self.kept[task] = nn.ParameterDict(
                {
                    _key(path, name): nn.Parameter(parameter.detach().clone(), requires_grad=False)
                    for path in towers.projector
                    for name, parameter in towers.model.get_submodule(path).named_parameters()
                }
            )

    @torch.no_grad()
    def restore(self, task: str, towers: Towers) -> None:
        """Give the model's projector the values of one that is kept."""
        kept = self.kept[task]
        assert isinstance(kept, nn.ParameterDict)
        for path in towers.projector:
            for name, parameter in towers.model.get_submodule(path).named_parameters():
                parameter.copy_(kept[_key(path, name)])

    def choose(self, choice: Tensor | None) -> None:
        """Say which task's projector each picture goes through from now on.

        Args:
            choice: [N], indices into the tasks in the order in which they were kept; larger ones are the model's own
                projector. None: the model's own for all.
        """
        self._choice = choice if choice is not None and len(choice) else None

    def _hook(self, path: str) -> Any:
        def through_own(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
            if self._choice is None or self._inside:
                return output
            assert len(output) == len(self._choice), (path, output.shape, self._choice.shape)
            self._inside = True
            try:
                for index, parameters in enumerate(self.kept.values()):
                    own = self._choice == index
                    if own.any():
                        assert isinstance(parameters, nn.ParameterDict)
                        values = {name: parameters[_key(path, name)] for name, _ in module.named_parameters()}
                        other = functional_call(module, values, args, kwargs)
                        output = torch.where(own.view(-1, *[1] * (output.dim() - 1)), other, output)
            finally:
                self._inside = False
            return output

        return through_own


def _key(path: str, name: str) -> str:
    return f"{path}.{name}".replace(".", "/")
