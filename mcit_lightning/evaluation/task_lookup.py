"""The configuration of one task of a shipped or own benchmark, without the experiment around it."""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mcit_lightning.aliases import find_task
from mcit_lightning.config import TaskConfig
from mcit_lightning.loading import experiments_dir
from mcit_lightning.registry import nearest


def find_task_config(name: str) -> TaskConfig:
    """The task `BENCHMARK/TASK`, for example `ucit/flickr30k`.

    Args:
        name: a benchmark or experiment that comes with the package, or the path of a YAML file, then the task's name in any
            of its spellings.

    Raises:
        ValueError: there is no such file or task; names the nearest.
    """
    benchmark, slash, task = name.rpartition("/")
    if not slash or not benchmark or not task:
        raise ValueError(f"{name!r} is no task: write BENCHMARK/TASK, for example ucit/flickr30k")
    tasks = _tasks(_file(benchmark), ())
    configs = {}
    for key, values in tasks.items():
        try:
            configs[key] = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(TaskConfig), _own(values)))
        except OmegaConfBaseException as error:
            raise ValueError(f"{benchmark}: tasks.{key}: {str(error).splitlines()[0]}") from error
    found = find_task(task, configs)
    if found is None:
        raise ValueError(f"{benchmark}: has no task {task!r}. {nearest(task, configs)}")
    config = configs[found]
    assert isinstance(config, TaskConfig)
    return config


def _own(values: Any) -> dict[str, Any]:
    """The keys that say what the task is; the others may refer to keys of the experiment."""
    kept = ("aliases", "metric", "metric_mode", "metric_args")
    return {key: values[key] for key in kept if isinstance(values, dict) and key in values}


def _file(benchmark: str) -> Path:
    folder = experiments_dir()
    candidates = [Path(benchmark), folder / "_base" / f"{benchmark}.yaml", folder / f"{benchmark}.yaml"]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        known = sorted(path.stem for path in (folder / "_base").glob("*.yaml"))
        raise ValueError(f"no benchmark {benchmark!r}: neither a file nor in {folder}. {nearest(benchmark, known)}")
    return found


def _tasks(path: Path, chain: tuple[Path, ...]) -> dict[str, Any]:
    """`tasks` of a file, over those of its bases."""
    path = path.resolve()
    if path in chain:
        raise ValueError(f"base: {' -> '.join(str(part) for part in (*chain, path))} is a cycle")
    try:
        content = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # OmegaConf and PyYAML raise kinds of their own
        raise ValueError(f"{path}: cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: the file must be a mapping of keys to values")
    bases = content.get("base", [])
    tasks: dict[str, Any] = {}
    for base in [bases] if isinstance(bases, str) else bases:
        _add(tasks, _tasks(path.parent / base, (*chain, path)))
    _add(tasks, content.get("tasks") or {})
    return tasks


def _add(tasks: dict[str, Any], further: dict[str, Any]) -> None:
    for key, values in further.items():
        old = tasks.get(key)
        tasks[key] = {**old, **values} if isinstance(old, dict) and isinstance(values, dict) else values
