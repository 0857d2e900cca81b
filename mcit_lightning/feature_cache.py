"""Outputs of a frozen vision tower, kept on the disk: a picture that is seen again does not run through the tower again.

Worth it where pictures are seen several times (a test set after every stage, several epochs) and the tower is a large part of the
work. A picture's key is a digest of the pixel values that the processor made of it, so another picture, size or normalisation is
another key. A tower that a strategy adapts is never cached.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from mcit_lightning.towers import Towers

logger = logging.getLogger(__name__)

DIGEST = 16
"""Bytes of a picture's key, and of the checksum in front of a file's content."""


def picture_keys(inputs: Mapping[str, Any]) -> list[str] | None:
    """A key for each picture or tile of a batch; None where the model takes pictures in another form than [N, 3, H, W]."""
    pixels = inputs.get("pixel_values")
    if pixels is None or pixels.dim() != 4:
        return None
    return [hashlib.blake2b(picture.numpy().tobytes(), digest_size=DIGEST).hexdigest() for picture in pixels]


class FeatureStore:
    """One file per picture; a file is there whole or not at all, and a damaged one counts as not there.

    Several processes may share the folder. Each may fill an equal part of what the limit leaves when it begins, so all of them
    together never pass it. When that is full, or the disk is, nothing more is written.

    Args:
        folder: where the files are; made when the first is written.
        limit: bytes that all processes may have there.
        processes: how many share the folder.
    """

    def __init__(self, folder: Path, limit: int, processes: int = 1) -> None:
        self.folder, self.limit = folder, limit
        self._left = (limit - _size(folder)) // processes
        self._closed = False

    def get(self, key: str) -> dict[str, Tensor]:
        """The tensors of a picture, on the CPU; empty if there are none."""
        path = self._path(key)
        try:
            content = path.read_bytes()
            if content[:DIGEST] != _digest(content[DIGEST:]):
                raise ValueError("wrong checksum")
            return safetensors.torch.load(content[DIGEST:])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, SafetensorError) as error:
            logger.warning("%s: is damaged (%s); the picture's features are computed anew", path, error)
            with suppress(OSError):
                path.unlink()
            return {}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors of a picture, if there is room."""
        if self._closed:
            return
        content = safetensors.torch.save({name: value.contiguous() for name, value in tensors.items()})
        path = self._path(key)
        temporary = path.with_name(f".{key}.{os.getpid()}.tmp")  # deleted when a killed run continues
        if DIGEST + len(content) > self._left:
            self._close(f"this process's part of {self.limit / 2**30:.1f} GiB is used (data.feature_cache_gb)")
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(_digest(content) + content)
            os.replace(temporary, path)
            self._left -= DIGEST + len(content)
        except OSError as error:
            with suppress(OSError):
                temporary.unlink()
            self._close(f"{self.folder}: {error.strerror}")

    def clear(self) -> None:
        """Delete all files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self, reason: str) -> None:
        self._closed = True
        logger.warning("no more picture features are kept: %s", reason)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.st"


class CachedTower(nn.Module):
    """A frozen vision tower that is asked only for pictures whose output is not in the store. Put in the tower's place.

    Outside of `pictures`, and for a batch whose pictures do not fit the keys, it is the tower alone.

    Args:
        tower: the tower.
        store: where its outputs are kept.
        layers: indices of the hidden states that the model reads where it asks for hidden states; empty if it never does.
    """

    def __init__(self, tower: nn.Module, store: FeatureStore, layers: Sequence[int]) -> None:
        super().__init__()
        self.tower, self.store, self.layers = tower, store, list(layers)
        self._keys: list[str] | None = None
        self.computed = 0
        """Pictures that went through the tower."""

    @property
    def config(self) -> Any:
        """The tower's configuration."""
        return self.tower.config

    @property
    def dtype(self) -> torch.dtype:
        """The tower's data type."""
        return next(self.tower.parameters()).dtype

    @contextmanager
    def pictures(self, keys: list[str] | None) -> Iterator[None]:
        """Context in which the tower is called with the pictures that have these keys, in their order."""
        self._keys = keys
        try:
            yield
        finally:
            self._keys = None

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        keys = self._keys
        if keys is None or len(keys) != len(pixel_values):
            self.computed += len(pixel_values)
            return self.tower(pixel_values, **kwargs)
        asked = kwargs.get("output_hidden_states")  # true, or in newer releases the indices
        wants_layers = asked is not None and asked is not False and bool(self.layers)
        names = [f"layer{index}" for index in self.layers] if wants_layers else []
        if not wants_layers or self.layers == [-1]:  # some families read the last layer's output under its own name
            names.append("last")
        found = [self.store.get(key) for key in keys]
        missing = [row for row, tensors in enumerate(found) if not set(names) <= set(tensors)]
        if missing:
            for row, tensors in zip(missing, self._compute(pixel_values, missing, names, kwargs), strict=True):
                found[row] = {**{name: value.to(pixel_values.device) for name, value in found[row].items()}, **tensors}
                self.store.put(keys[row], {name: value.cpu() for name, value in found[row].items()})
        stacked = {
            name: torch.stack([tensors[name].to(pixel_values.device, non_blocking=True) for tensors in found])
            for name in names
        }
        count = self.config.num_hidden_layers + 1
        hidden: list[Tensor | None] = [None] * count
        for index in self.layers if wants_layers else ():
            hidden[index] = stacked[f"layer{index}"]
        return BaseModelOutputWithPooling(
            last_hidden_state=stacked.get("last"),
            hidden_states=tuple(hidden) if wants_layers else None,  # type: ignore[arg-type]
        )

    @torch.no_grad()
    def _compute(
        self, pixels: Tensor, rows: list[int], names: Sequence[str], kwargs: dict[str, Any]
    ) -> list[dict[str, Tensor]]:
        """The named tensors of some pictures."""
        self.computed += len(rows)
        chosen = pixels if len(rows) == len(pixels) else pixels[rows]
        output = self.tower(chosen, **kwargs)
        parts = {
            name: output.last_hidden_state if name == "last" else output.hidden_states[int(name.removeprefix("layer"))]
            for name in names
        }
        return [{name: value[row] for name, value in parts.items()} for row in range(len(rows))]


def why_not(towers: Towers, targets: Mapping[str, Sequence[str]]) -> str:
    """Why the tower's outputs cannot be cached; empty if they can.

    Args:
        targets: of the strategy.
    """
    if targets.get("vision"):
        return "the strategy adapts the vision tower, so its outputs change"
    if any(path.startswith(f"{towers.vision}.") for path in towers.projector):
        return f"{type(towers.model).__name__} has its projector inside of the vision tower"
    return ""


def attach(towers: Towers, folder: Path, limit: int, processes: int) -> CachedTower:
    """Put a `CachedTower` in the place of the vision tower, or return the one that is there.

    Args:
        folder: of the store that all processes share.
        limit: bytes of it, over all processes.
        processes: how many there are.
    """
    tower = towers.model.get_submodule(towers.vision)
    if isinstance(tower, CachedTower):
        return tower
    layer = getattr(towers.model.config, "vision_feature_layer", None)
    layers = [] if layer is None else [layer] if isinstance(layer, int) else list(layer)
    cached = CachedTower(tower, FeatureStore(folder, limit, processes), layers)
    parent, _, name = towers.vision.rpartition(".")
    setattr(towers.model.get_submodule(parent), name, cached)
    return cached


def _size(folder: Path) -> int:
    """Bytes of the files in a store; another process may delete a damaged one meanwhile."""
    size = 0
    for file in folder.glob("*/*.st"):
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()
