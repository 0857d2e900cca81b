"""Name -> class tables that answer a wrong name with the nearest right one."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


def nearest(value: str, known: Iterable[str]) -> str:
    """A sentence part that helps after a wrong name: the nearest known one, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(value, names, n=1, cutoff=0.5)
    hint = f"Did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names) or 'none'}."


class Registry(Generic[T]):
    """A table of named classes, filled by explicit `register` calls in the modules that define them.

    Args:
        kind: what the table holds, for error messages ("strategy").
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that enters the class under `name`.

        Raises:
            ValueError: the name is taken by another class.
        """

        def enter(cls: type[T]) -> type[T]:
            taken = self._entries.get(name)
            if taken is not None and taken is not cls:
                raise ValueError(
                    f"{self.kind} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}"
                )
            self._entries[name] = cls
            return cls

        return enter

    def get(self, name: str) -> type[T]:
        """The class registered under `name`.

        Raises:
            ValueError: nothing is; the message names the nearest known name.
        """
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}. {nearest(name, self._entries)}")
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)
