"""Whether the content of an experiment file has the form of the schema: keys, mappings and lists, before values are converted."""

import reprlib
from dataclasses import is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from mcit_lightning.registry import nearest


def check_shape(content: Any, schema: Any, source: str, place: str = "") -> None:
    """Compare a value with the type that it should have; numbers and texts are left to OmegaConf, which converts them.

    Args:
        content: of an experiment file, an override, or a part of it.
        schema: a dataclass or an annotation of one of its fields.
        source: file or override, for messages.
        place: dotted key of the value; empty for the whole file.

    Raises:
        ValueError: names source, key, value and what must be there.
    """
    if get_origin(schema) in (UnionType, Union):
        if content is None and NoneType in get_args(schema):
            return
        schema = next(kind for kind in get_args(schema) if kind is not NoneType)
    origin = get_origin(schema) or schema
    if is_dataclass(schema):
        _require(content, dict, "a mapping of keys to values", source, place)
        hints = get_type_hints(schema)
        for key, value in content.items():
            if key not in hints:
                raise ValueError(
                    f"{source}: unknown key {_join(place, key)} (value {reprlib.repr(value)}). {nearest(str(key)[:99], hints)}"
                )
            check_shape(value, hints[key], source, _join(place, key))
    elif origin is dict:
        _require(content, dict, "a mapping of keys to values", source, place)
        for key, value in content.items():
            if not isinstance(key, str):
                raise ValueError(f"{source}: {place}: the key {key!r} must be a text; write it in quotes")
            check_shape(value, get_args(schema)[1], source, _join(place, key))
    elif origin in (list, tuple):
        _require(content, list, "a list, written as [a, b]", source, place)
        for number, value in enumerate(content):
            check_shape(value, get_args(schema)[0], source, f"{place}[{number}]")
    elif schema is not Any and isinstance(content, dict | list):
        raise ValueError(f"{source}: {place}: is {reprlib.repr(content)}, must be a single value")
    elif schema is not Any and content is None:
        raise ValueError(f"{source}: {place}: is empty; give it a value, or remove the key")


def _require(content: Any, kind: type, what: str, source: str, place: str) -> None:
    if not isinstance(content, kind):
        named = place == "strategy" and isinstance(content, str) and content.isidentifier()
        instead = f"; write strategy.name={content[:99]}" if named else ""
        raise ValueError(f"{source}: {place or 'the file'}: is {reprlib.repr(content)}, must be {what}{instead}")


def _join(place: str, key: Any) -> str:
    return f"{place}.{str(key)[:99]}" if place else str(key)[:99]
