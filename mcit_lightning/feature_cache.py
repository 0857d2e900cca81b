"""Outputs of a frozen vision tower: one pass for each batch, and kept on the disk for pictures that are seen again.

The disk is worth it where pictures are seen several times (a test set after every stage, several epochs) and the tower is a large
part of the work. A picture's key is a digest of the pixel values that the processor made of it, so another picture, size or
normalisation is another key. A tower that a strategy adapts is left as it is.
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

from mcit_lightning.config import DataConfig
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
    """A frozen vision tower that runs once for each batch, and only for pictures whose output is not in the store. Put in the
    tower's place.

    Strategies read the tower's output too, before the model does: inside of `pictures` the second one gets what the first has
    computed. Outside, it is the tower alone.

    Args:
        tower: the tower.
        store: where its outputs are kept beyond a batch; None for nowhere.
        layers: indices of the hidden states that the model reads where it asks for hidden states; empty if it never does.
        last: the last layer's output is read too, by others than the model.
    """

    def __init__(
        self, tower: nn.Module, store: FeatureStore | None, layers: Sequence[int], *, last: bool = False
    ) -> None:
        super().__init__()
        self.tower, self.store, self.layers = tower, store, list(layers)
        self._always = [f"layer{index}" for index in self.layers]
        # some families read the last layer's output under its own name
        if last or not self.layers or self.layers == [-1]:
            self._always.append("last")
        self._inside = False
        self._keys: list[str] | None = None
        self._seen: tuple[Tensor, dict[str, Tensor]] | None = None
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
    def pictures(self, keys: list[str] | None = None) -> Iterator[None]:
        """Context of one batch, in which what was computed is remembered.

        Args:
            keys: of the batch's pictures, in their order, for the store; None if they are not to be looked for there.
        """
        self._inside, self._keys = True, keys
        try:
            yield
        finally:
            self._inside, self._keys, self._seen = False, None, None

    def forward(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        if not self._inside:
            self.computed += len(pixel_values)
            return self.tower(pixel_values, **kwargs)
        asked = kwargs.get("output_hidden_states")  # true, or in newer releases the indices
        wants_layers = asked is not None and asked is not False and bool(self.layers)
        names = [f"layer{index}" for index in self.layers] if wants_layers else ["last"]
        found = self._tensors(pixel_values, names, kwargs)
        hidden: list[Tensor | None] = [None] * (self.config.num_hidden_layers + 1)
        for index in self.layers if wants_layers else ():
            hidden[index] = found[f"layer{index}"]
        return BaseModelOutputWithPooling(
            last_hidden_state=found.get("last"),
            hidden_states=tuple(hidden) if wants_layers else None,  # type: ignore[arg-type]
        )

    def _tensors(self, pixels: Tensor, names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """At least the named tensors of all pictures."""
        if self._seen is None or not _is_same(self._seen[0], pixels):
            self._seen = pixels, {}
        found = self._seen[1]
        if not set(names) <= set(found):
            wanted = list(dict.fromkeys([*self._always, *names]))
            if self.store is None or self._keys is None or len(self._keys) != len(pixels):
                found.update(self._compute(pixels, wanted, kwargs))
            else:
                found.update(self._look_up(self.store, self._keys, pixels, wanted, kwargs))
        return found

    def _look_up(
        self, store: FeatureStore, keys: list[str], pixels: Tensor, names: Sequence[str], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """The named tensors from the store, and of the pictures that are not there from the tower."""
        found = [store.get(key) for key in keys]
        missing = [row for row, tensors in enumerate(found) if not set(names) <= set(tensors)]
        if missing:
            computed = self._compute(pixels if len(missing) == len(pixels) else pixels[missing], names, kwargs)
            for number, row in enumerate(missing):
                found[row] = {**found[row], **{name: value[number] for name, value in computed.items()}}
                store.put(keys[row], {name: value.cpu() for name, value in found[row].items()})
        return {
            name: torch.stack([tensors[name].to(pixels.device, non_blocking=True) for tensors in found])
            for name in names
        }

    @torch.no_grad()
    def _compute(self, pixels: Tensor, names: Sequence[str], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """The named tensors of some pictures, in one pass."""
        self.computed += len(pixels)
        if set(names) != {"last"}:
            kwargs = {**kwargs, "output_hidden_states": kwargs.get("output_hidden_states") or self.layers}
        output = self.tower(pixels, **kwargs)
        return {
            name: output.last_hidden_state if name == "last" else output.hidden_states[int(name.removeprefix("layer"))]
            for name in names
        }


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors, the first of which is held, are views of the same memory: a picture batch is never written to."""
    alike = (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
    return alike and one.data_ptr() == other.data_ptr()


def cached_tower(
    towers: Towers, data: DataConfig, folder: Path, processes: int, *, targets: Mapping[str, Sequence[str]], read: bool
) -> CachedTower | None:
    """Put a `CachedTower` in the place of the vision tower, if that is wanted and possible, or return the one that is there.

    Args:
        towers: of the model.
        data: `feature_cache` says whether outputs are kept beyond a batch.
        folder: of the store that all processes share.
        processes: how many there are.
        targets: of the strategy.
        read: whether the strategy reads the tower's outputs too.

    Raises:
        ValueError: a store is demanded, but the tower's outputs cannot be cached.
    """
    if data.feature_cache == "never" and not read:
        return None
    reason = why_not(towers, targets)
    if reason:
        if data.feature_cache == "always":
            raise ValueError(f"data.feature_cache: is 'always', but {reason}. Set it to auto or never")
        return None
    tower = towers.model.get_submodule(towers.vision)
    if isinstance(tower, CachedTower):
        return tower
    limit = int(data.feature_cache_gb * 2**30)
    store = None if data.feature_cache == "never" else FeatureStore(folder, limit, processes)
    layer = getattr(towers.model.config, "vision_feature_layer", None)
    layers = [] if layer is None else [layer] if isinstance(layer, int) else list(layer)
    cached = CachedTower(tower, store, layers, last=read)
    parent, _, name = towers.vision.rpartition(".")
    setattr(towers.model.get_submodule(parent), name, cached)
    return cached


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


def _size(folder: Path) -> int:
    """Bytes of the files in a store; another process may delete a damaged one meanwhile."""
    size = 0
    for file in folder.glob("*/*.st"):
        with suppress(FileNotFoundError):
            size += file.stat().st_size
    return size


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=DIGEST).digest()
