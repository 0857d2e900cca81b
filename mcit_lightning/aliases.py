"""Task names in the spellings that papers and repositories use: `VQAv2`, `vqa_v2` and `vqav2` are one task."""

from collections.abc import Iterable, Mapping
from typing import Any


def spelling(name: str) -> str:
    """A name without case and separators, which is what two spellings of it have in common."""
    return "".join(character for character in name.casefold() if character.isalnum())


def spellings(name: str, aliases: Iterable[str]) -> set[str]:
    """All that a task answers to: its own name and its aliases."""
    return {spelling(known) for known in (name, *aliases)}


def find_task(name: str, tasks: Mapping[Any, Any]) -> str | None:
    """The task that a name stands for, by its own name or one of its `aliases`, without regard to case, `-` and `_`.

    Args:
        name: as written in `order` or in an override.
        tasks: task names to objects with `aliases`.

    Returns:
        The name under `tasks`; None if no task answers to it.
    """
    if name in tasks:
        return name
    wanted = spelling(name)
    return next((str(task) for task in tasks if wanted in spellings(str(task), tasks[task].aliases)), None)


def check_aliases(tasks: Mapping[str, Any]) -> None:
    """Refuse two tasks that answer to one spelling.

    Raises:
        ValueError: names both tasks and the spelling.
    """
    owners: dict[str, str] = {}
    for task in tasks:
        for known in sorted(spellings(task, tasks[task].aliases)):
            if owners.setdefault(known, task) != task:
                raise ValueError(
                    f"tasks.{task}.aliases: {known!r} is also a spelling of task {owners[known]!r}; case, - and _ do not "
                    "count. Rename one of them."
                )
