"""From YAML files and `key=value` overrides to a checked `ExperimentConfig`.

Order of precedence: schema defaults, then the files named under `base:` (left to right, each with its own bases), then the file,
then the command line. Every mistake is a `ValueError` that names the key, the value and the nearest valid name.
"""

import importlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from mcit_lightning.aliases import find_task
from mcit_lightning.composition import Composition, compose
from mcit_lightning.config import ExperimentConfig
from mcit_lightning.registry import nearest
from mcit_lightning.shapes import check_shape


def cache_dir(name: str = "") -> str:
    """Folder for files that are made once and shared by all runs: `$MCIT_CACHE`, else the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    base = Path(os.environ.get("MCIT_CACHE") or Path(home) / "mcit_lightning")
    return str(base / name)


def experiments_dir() -> Path:
    """Folder of the shipped experiments: the repository's `experiments/`, or the copy inside an installed wheel."""
    repository = Path(__file__).resolve().parent.parent / "experiments"
    return repository if repository.is_dir() else Path(__file__).resolve().parent / "experiments"


def find_experiment(name: str) -> Path:
    """The file of an experiment given by path or by bare name; a composition (`llava7b+ucit+dmole`) stays as it is.

    Raises:
        ValueError: there is none; lists what there is.
    """
    folder = experiments_dir()
    if compose(name, folder) is not None:
        return Path(name)
    candidates = [Path(name), folder / f"{name}.yaml"]
    if str(Path(name).parent) in (".", "experiments"):  # another folder would be another experiment
        candidates.append(folder / Path(name).name)
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    known = [path.stem for path in folder.glob("*.yaml")]
    if (folder / "_base" / f"{name}.yaml").is_file() or (folder / "_base/strategy" / f"{name}.yaml").is_file():
        raise ValueError(
            f"no experiment {name!r}: it is a part of one. Name a backbone, a benchmark and a strategy, as in llava7b+ucit+dmole"
        )
    raise ValueError(f"no experiment {name!r}: neither a file nor in {folder}. {nearest(Path(name).stem, known)}")


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> ExperimentConfig:
    """Read an experiment file with its bases and overrides, and check it without loading model or data.

    Args:
        path: the YAML file, or a composition (`mcit_lightning.composition`).
        overrides: `key=value` strings, for example `tasks.flags.epochs=2` or `order=[flags,digits]`.

    Raises:
        ValueError: any unreadable file, unknown key, wrong type, missing value, or unknown strategy, metric, callback or
            trainer argument.
    """
    from mcit_lightning.validation import validate  # imports torch: not needed to report a wrong key

    if not OmegaConf.has_resolver("cache"):
        register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)  # renamed in OmegaConf 2.4
        register("cache", cache_dir)
    overrides = list(overrides)
    merged: DictConfig = OmegaConf.structured(ExperimentConfig)
    composed = compose(str(path), experiments_dir())
    files = _with_bases(Path(path), ()) if composed is None else _with_parts(composed)
    for file, content in files:
        merged = _merge(merged, content, str(file))
    for override in overrides:
        _override(merged, override)
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ValueError(
            f"{path}: {error.full_key} is not set and has no default; add it to the file or the command line"
        ) from error
    except (OmegaConfBaseException, ValueError, RecursionError) as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ValueError(f"{path}: {key}: {_first_line(error)}. Correct the file or the command line") from error
    assert isinstance(config, ExperimentConfig)
    config.held_out = [find_task(name, config.tasks) or name for name in config.held_out]
    trained = config.order or [name for name in config.tasks if name not in config.held_out]
    config.order = [find_task(name, config.tasks) or name for name in trained]
    _name_targets(config)
    for name in config.imports:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(
                f"{path}: imports: no module {name!r}; is its folder the current one or on PYTHONPATH?"
            ) from error
    validate(config, f"{path} with {' '.join(overrides)}" if overrides else str(path))
    return config


def to_yaml(config: ExperimentConfig) -> str:
    """The resolved configuration as YAML text."""
    return OmegaConf.to_yaml(OmegaConf.create(asdict(config)))


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> leaf value, for comparing configurations."""
    if isinstance(node, Mapping):
        items: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list | tuple):
        items = enumerate(node)
    else:
        return {prefix: node}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def _with_bases(path: Path, chain: tuple[Path, ...]) -> list[tuple[Path, dict[str, Any]]]:
    """The file's content preceded by its bases', in order of merging."""
    named = f", named under 'base:' in {chain[-1]}" if chain else ""
    real = _existing(path, named)
    if real in chain:
        raise ValueError(f"base: {' -> '.join(map(str, (*chain, real)))} is a cycle; remove one of them")
    content = _read_yaml(real, named)
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the file must be a mapping of keys to values, not a {type(content).__name__}{named}")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"{path}: base: must be a file name or a list of file names, not {bases!r}")
    files: list[tuple[Path, dict[str, Any]]] = []
    for base in bases:
        files += _with_bases(real.parent / base, (*chain, real))
    return [*files, (real, content)]


def _existing(path: Path, named: str) -> Path:
    """The file that a path leads to."""
    try:
        real = path.resolve()
        if real.is_file():
            return real
        kind = "no such file" if not real.exists() else "not a file:"
    except (OSError, ValueError, RuntimeError) as error:  # too long a name, a zero byte, links in a circle
        raise ValueError(f"{str(path)[:500]!r}: {_in_short(error)}{named}; correct the name") from error
    raise ValueError(f"{kind} {path}{named}; correct the name")


def _read_yaml(path: Path, named: str) -> Any:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        # PyYAML reads 1e-4 as text, OmegaConf's loader as a number (and refuses a key that is there twice).
        return OmegaConf.to_container(OmegaConf.load(path)) if content else {}
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as YAML{named}: {_in_short(error)}. Correct the file") from error


def _with_parts(composed: Composition) -> list[tuple[Path, dict[str, Any]]]:
    """The contents of a composition's parts with their bases, in order of merging.

    Raises:
        ValueError: two parts are backbones, or two are benchmarks.
    """
    files: list[tuple[Path, dict[str, Any]]] = []
    kinds: dict[str, list[str]] = {"backbone": [], "benchmark": []}
    for part, path in composed.files.items():
        own = _with_bases(path, ())
        files += own
        keys = {key for _, content in own for key in flatten(content)}
        kinds["backbone"] += [part] * ("backbone.id" in keys)
        kinds["benchmark"] += [part] * any(key.startswith("tasks.") for key in keys)
    for kind, parts in kinds.items():
        if len(parts) != 1:
            found = f"{' and '.join(parts)} are two {kind}s" if parts else f"no part is a {kind}"
            raise ValueError(f"{composed.name}: {found}; name one {kind}, as in llava7b+ucit+dmole")
    added: dict[str, Any] = {"name": composed.name}
    if composed.strategy is not None:
        added["strategy"] = {"name": composed.strategy}
    return [*files, (Path(composed.name), added)]


def _merge(merged: DictConfig, content: dict[str, Any], source: str) -> DictConfig:
    check_shape(content, ExperimentConfig, source)
    strategy = content.get("strategy")
    if isinstance(strategy, dict):
        if strategy.get("name") not in (None, merged.strategy.get("name")):
            merged.strategy = {}  # hyper-parameters that a base gave to another strategy
        for key in [key for key, value in strategy.items() if isinstance(value, dict)]:
            merged.strategy.pop(key, None)  # targets replace a base's: a tower that they do not name gets no adapters
    try:
        result = OmegaConf.merge(merged, content)
    except (OmegaConfBaseException, ValueError, TypeError, OverflowError) as error:
        key = getattr(error, "full_key", None) or "a value"
        raise ValueError(f"{source}: {key}: {_first_line(error)}. Correct the file") from error
    assert isinstance(result, DictConfig)
    return result


def _override(merged: DictConfig, override: str) -> None:
    """Apply one `key=value`, in place."""
    key, equals, text = override.partition("=")
    shown = override if len(override) < 200 else f"{override[:200]}..."
    if not equals or not key:
        raise ValueError(f"override {shown!r}: write it as key=value, for example tasks.flags.epochs=2")
    try:
        value = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]  # type: ignore[index,call-overload]
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"override {shown!r}: the value is not valid YAML: {_in_short(error)}") from error
    nested: Any = value
    for part in reversed(key.split(".")):
        nested = {part: nested}
    if not any(part.isdecimal() for part in key.split(".")):  # which names an element of a list
        check_shape(nested, ExperimentConfig, f"override {shown!r}")
    parts = key.split(".")
    if parts[0] == "tasks" and len(parts) > 2:
        task = find_task(parts[1], merged.tasks)
        if task is None:
            raise ValueError(f"override {shown!r}: no task {parts[1]!r}. {nearest(parts[1], map(str, merged.tasks))}")
        key = ".".join([parts[0], task, *parts[2:]])
    try:
        # a mapping for `strategy` or a hyper-parameter is a new one: what the old one held does not belong to it
        OmegaConf.update(merged, key, value, merge=parts[0] != "strategy")
    except (OmegaConfBaseException, ValueError, TypeError, IndexError, OverflowError) as error:
        raise ValueError(f"override {shown!r}: {_first_line(error)}. Correct it, or its key") from error


def _name_targets(config: ExperimentConfig) -> None:
    """Replace the names of groups in the strategy's targets by the linears that the backbone has under them."""
    targets = config.strategy.get("targets")
    if not isinstance(targets, dict):
        return
    for tower, names in targets.items():
        groups = config.backbone.targets.get(str(tower), {})
        if isinstance(names, list):
            targets[tower] = [linear for name in names for linear in groups.get(name, [name])]


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:500].rstrip(".")


def _in_short(error: BaseException) -> str:
    """What a reader says of a file, on one line."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())[:500].rstrip(".") or type(error).__name__
