"""A backbone without weights: the model that a checkpoint's `config.json` describes, on the meta device."""

from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import HfApi, try_to_load_from_cache
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from mcit_lightning.config import BackboneConfig
from mcit_lightning.towers import Towers

HUB_SECONDS = 3.0
"""How long the hub may take to answer; a run would try again for half a minute."""
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def build_towers(backbone: BackboneConfig) -> Towers:
    """The model on the meta device, with its towers: shapes and names, no numbers.

    Raises:
        ValueError: there is no configuration to read, or it is not that of a LLaVA-style model; says why in one line.
    """
    config = read_config(backbone)
    try:
        with torch.device("meta"):
            model = AutoModelForImageTextToText.from_config(config, trust_remote_code=backbone.trust_remote_code)
    except (ImportError, OSError, ValueError, KeyError) as error:
        raise ValueError(f"backbone.id: {backbone.id!r} cannot be built: {_first_line(error)}") from error
    model.requires_grad_(False)
    return Towers.of(model, backbone.projector)


def read_config(backbone: BackboneConfig) -> PretrainedConfig:
    """The model's configuration, from its folder, the hub's cache, our own table of public checkpoints (`architectures.yaml`), or
    the hub if that answers at once.

    Raises:
        ValueError: none of them has it.
    """
    arguments = {"revision": backbone.revision or "main", "trust_remote_code": backbone.trust_remote_code}
    try:
        return AutoConfig.from_pretrained(backbone.id, local_files_only=True, **arguments)
    except (OSError, ValueError, KeyError) as error:
        known = _known(backbone)
        if known is not None:
            return known
        if is_path(backbone.id):
            reason = _first_line(error) if Path(backbone.id).is_dir() else "there is no such folder"
            raise ValueError(f"backbone.id: {backbone.id!r} has no readable config.json: {reason}") from error
    try:
        HfApi().model_info(backbone.id, revision=backbone.revision, timeout=HUB_SECONDS)
        return AutoConfig.from_pretrained(backbone.id, **arguments)
    except Exception as error:  # every release of the hub's library has other classes for a network that is not there
        raise ValueError(
            f"backbone.id: {backbone.id!r} is in no folder and not in the hub's cache, and the hub does not give it: "
            f"{_first_line(error)}"
        ) from error


def architectures() -> dict[str, Any]:
    """Hub name, or name of a folder, to `config` and `parameters` of the checkpoints whose shapes are known here."""
    content: dict[str, Any] = yaml.safe_load(
        files(__package__).joinpath("architectures.yaml").read_text(encoding="utf-8")
    )
    return content


def _known(backbone: BackboneConfig) -> PretrainedConfig | None:
    """The shape in our table: under the hub's name, or under the last part of it where the backbone is a folder yet to come."""
    if backbone.revision is not None or Path(backbone.id).is_dir():
        return None
    last = Path(backbone.id).name if is_path(backbone.id) else None
    for name, entry in architectures().items():
        if backbone.id == name or last == name.rpartition("/")[2]:
            return AutoConfig.for_model(**entry["config"])
    return None


def has_weights(name: str, revision: str | None = None) -> bool:
    """Whether a model's weights are on this machine, in the folder of that name or in the hub's cache."""
    if is_path(name):
        return any((Path(name).expanduser() / file).is_file() for file in WEIGHTS)
    found = (try_to_load_from_cache(name, file, revision=revision) for file in WEIGHTS)
    return any(isinstance(path, str) for path in found)


def is_path(name: str) -> bool:
    """A folder, or what can only be meant as one: a hub name is `name` or `owner/name`."""
    return Path(name).is_dir() or name.startswith((".", "/", "~")) or name.count("/") > 1


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
