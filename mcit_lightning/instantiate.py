"""Build objects from `{_target_: dotted.path, ...}` nodes; arguments are checked against the signature before anything runs."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from mcit_lightning.registry import nearest


def resolve(path: str, where: str) -> Callable[..., Any]:
    """Import the callable that a dotted path names.

    Args:
        path: for example `callbacks.BackwardTransfer`.
        where: the configuration key, for the message.

    Raises:
        ValueError: the module or the name does not exist.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        raise ValueError(f"{where}._target_: {path!r} is not a dotted path such as 'callbacks.BackwardTransfer'")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise  # the module exists, something that it imports does not
        raise ValueError(f"{where}._target_: no module {module_name!r} (in {path!r})") from error
    if not hasattr(module, name):
        public = [n for n in getattr(module, "__all__", dir(module)) if not n.startswith("_")]
        raise ValueError(f"{where}._target_: {module_name!r} has no {name!r}. {nearest(name, public)}")
    return getattr(module, name)


def check_arguments(
    target: Callable[..., Any], kwargs: Mapping[str, Any], where: str, given: tuple[str, ...] = ()
) -> None:
    """Bind `kwargs` to the signature of `target` without calling it.

    Args:
        given: names of arguments that the caller adds itself.

    Raises:
        ValueError: an argument is unknown or a required one is missing; names the configuration key.
    """
    parameters = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in kwargs:
            if key not in parameters:
                known = [n for n in parameters if n not in given]
                raise ValueError(f"{where}.{key}: unknown argument of {target.__qualname__}. {nearest(key, known)}")
    for name, parameter in parameters.items():
        required = parameter.default is parameter.empty and parameter.kind in (
            parameter.POSITIONAL_OR_KEYWORD,
            parameter.KEYWORD_ONLY,
        )
        if required and name not in kwargs and name not in given:
            raise ValueError(f"{where}.{name}: {target.__qualname__} needs this argument and it is not set")


def split_node(node: Mapping[str, Any], where: str) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The target of a node and its arguments, not yet called.

    Raises:
        ValueError: the node has no `_target_`, or it cannot be resolved.
    """
    if "_target_" not in node:
        raise ValueError(f"{where}: needs a '_target_' with the dotted path of what to build; got keys {sorted(node)}")
    return resolve(node["_target_"], where), {key: value for key, value in node.items() if key != "_target_"}
