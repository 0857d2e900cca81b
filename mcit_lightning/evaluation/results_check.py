"""What may be inside of `results.json`: every field that something reads, with its type and range.

A file that was changed by hand or by another program is refused here, by the name of the field, before a page is drawn from it.
Fields that nothing reads may hold anything.
"""

import re
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

Check = Callable[[Any, str], None]
"""Takes a value and its key; raises ValueError."""

TOWERS = ("vision", "language")
LARGEST = 10**15
"""Of counts, seconds, bytes and scores: far above any, and far below what a drawing could not take."""
UNDRAWABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
"""Characters that XML, and so a page's figures, cannot have: control characters and halves of a pair."""


def check_results(values: dict[str, Any]) -> None:
    """Check the content of `results.json`.

    Raises:
        ValueError: a field is missing or is not what it must be; names it, for example `cost[1].train_seconds`.
    """
    RESULTS(values, "")
    tasks = values["tasks"]
    if len(set(tasks)) < len(tasks):
        raise ValueError("tasks: names a task twice, must name each once")
    if set(values["metrics"]) != set(tasks):
        raise ValueError("tasks: are not those that metrics names; must be the same")
    if [len(row) for row in values["matrix"]] != [len(tasks)] * len(tasks):
        raise ValueError(f"matrix: must be {len(tasks)} rows of {len(tasks)} scores, a row and a column for each task")
    if values["zero_shot"] is not None and len(values["zero_shot"]) != len(tasks):
        raise ValueError(
            f"zero_shot: has {len(values['zero_shot'])} scores, must have one for each of {len(tasks)} tasks"
        )
    for place, row in enumerate(values["cost"]):
        if row["row"] >= len(tasks):
            raise _wrong(row["row"], f"cost[{place}].row", f"less than the number of tasks, {len(tasks)}")


def text(value: Any, key: str) -> None:
    """A text that a page can show."""
    if not isinstance(value, str):
        raise _wrong(value, key, "a text")
    if UNDRAWABLE.search(value):
        raise _wrong(value, key, "a text without control characters")


def folder(value: Any, key: str) -> None:
    """The name of a folder, not a path."""
    text(value, key)
    if not value or value.startswith(".") or any(char in value for char in "/\\\0"):
        raise _wrong(value, key, "the name of a folder")


def count(value: Any, key: str) -> None:
    """A whole number, zero or more."""
    if type(value) is not int or not 0 <= value <= LARGEST:
        raise _wrong(value, key, "a whole number, zero or more")


def whole(value: Any, key: str) -> None:
    """A whole number."""
    if type(value) is not int or abs(value) > LARGEST:
        raise _wrong(value, key, "a whole number")


def number(value: Any, key: str) -> None:
    """A finite number of a common size."""
    if type(value) not in (int, float) or not abs(value) <= LARGEST:  # which NaN is not either
        raise _wrong(value, key, "a number")


def measured(value: Any, key: str) -> None:
    """A number, zero or more: a time, a rate, a share."""
    number(value, key)
    if value < 0:
        raise _wrong(value, key, "a number, zero or more")


def norm(value: Any, key: str) -> None:
    """A finite number of any size."""
    if type(value) not in (int, float) or not abs(value) <= sys.float_info.max:
        raise _wrong(value, key, "a number")


def maybe(check: Check) -> Check:
    """What `check` takes, or null."""
    return lambda value, key: None if value is None else check(value, key)


def each(check: Check, *, least: int = 0) -> Check:
    """A list of at least so many of what `check` takes."""

    def check_list(value: Any, key: str) -> None:
        if not isinstance(value, list) or len(value) < least:
            raise _wrong(value, key, f"a list of at least {least}" if least else "a list")
        for place, item in enumerate(value):
            check(item, f"{key}[{place}]")

    return check_list


def table(check: Check, keys: Collection[str] | None = None) -> Check:
    """A mapping, with these keys at most, to what `check` takes."""

    def check_table(value: Any, key: str) -> None:
        for name, item in _mapping(value, key).items():
            if keys is not None and name not in keys:
                raise ValueError(f"{key}: has the key {name!r:.80}, must have {' and '.join(keys)} at most")
            if UNDRAWABLE.search(name):
                raise ValueError(f"{key}: has the key {name!r:.80}, must have keys without control characters")
            check(item, f"{key}.{name:.80}")

    return check_table


def record(needed: Mapping[str, Check], further: Mapping[str, Check]) -> Check:
    """A mapping with the `needed` keys, and maybe `further` ones; others are not looked at."""

    def check_record(value: Any, key: str) -> None:
        _mapping(value, key or "the file")
        prefix = f"{key}." if key else ""
        for name, check in needed.items():
            if name not in value:
                raise ValueError(f"{prefix}{name}: is missing")
            check(value[name], f"{prefix}{name}")
        for name, check in further.items():
            if name in value:
                check(value[name], f"{prefix}{name}")

    return check_record


def stage_number(value: Any, key: str) -> None:
    """A mapping whose keys are the numbers of stages, to scores by task."""
    for name, scores in _mapping(value, key).items():
        if not (name.isascii() and name.isdecimal() and len(name) < 7):
            raise ValueError(f"{key}: has the key {name!r:.80}, must have the numbers of stages")
        table(number)(scores, f"{key}.{name}")


def _mapping(value: Any, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(value, key, "a mapping")
    return value


def _wrong(value: Any, key: str, wanted: str) -> ValueError:
    return ValueError(f"{key}: is {shown(value)}, must be {wanted}")


def shown(value: Any) -> str:
    """A value in short; `repr` refuses a number of thousands of digits, and nothing needs to see one."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return "a number of more than 15 digits"
    return f"{value!r:.80}" if not isinstance(value, dict | list) else f"a {type(value).__name__} of {len(value)}"


COST = record(
    {"stage": text, "folder": folder, "row": count},
    {
        **dict.fromkeys(("trainable_params", "stored_params", "peak_memory_bytes"), maybe(count)),
        **dict.fromkeys(
            (
                "proxy_seconds",
                "router_seconds",
                "train_seconds",
                "train_samples_per_second",
                "eval_seconds",
                "eval_samples_per_second",
                "routing_seconds_per_sample",
                "first_routing_seconds_per_sample",
                "generation_seconds_per_sample",
            ),
            maybe(measured),
        ),
    },
)
ROUTING = record(
    {"accuracy": maybe(number), "confusion": table(table(count))},
    {
        "among": maybe(number),
        "rejected": table(number),
        "experts": table(measured),
        "per_stage": table(maybe(number)),
        "rejected_per_stage": table(table(number)),
    },
)
ALLOCATION = record(
    {"ratios": table(measured, TOWERS), "ranks": table(count)},
    {"budget": table(count, TOWERS), "difficulty": table(norm, TOWERS), "scores": table(norm)},
)
RESULTS = record(
    {
        **dict.fromkeys(("experiment", "strategy", "backbone"), text),
        "seed": whole,
        "tasks": each(text, least=1),
        "metrics": table(text),
        "matrix": each(each(maybe(number))),
        "zero_shot": maybe(each(maybe(number))),
        "routing": maybe(ROUTING),
        "cost": each(COST),
        "notes": record({}, {"data": table(table(count))}),
    },
    {
        "allocation": table(ALLOCATION),
        "modules": table(table(each(text)), TOWERS),
        "freezing": table(table(each(text))),
        "held_out": record({}, {"metrics": table(text), "scores": stage_number}),
    },
)
