"""The reference pages of the documentation, made of the dataclasses and docstrings that they describe.

    python -m mcit_lightning.reference docs

writes `configuration.md` (every key of an experiment, and every strategy's hyper-parameters) and `callbacks.md`. A test compares
the pages with the code.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin

import lightning as L
from omegaconf import MISSING as REQUIRED

from mcit_lightning.config import ExperimentConfig, TaskConfig
from mcit_lightning.strategies import STRATEGIES

PAGES = ("configuration.md", "callbacks.md")
NOTE = "<!-- Made by `make docs` from the code; change the docstrings there. -->"


def configuration() -> str:
    """The page of all configuration keys, as Markdown."""
    parts = [
        "# Configuration",
        NOTE,
        "Every key of an experiment file, with its type and default. `???` must be set. A key is overridden on the command line "
        'by its dotted path: `make exp EXP=quickstart ARGS="optim.lr=1.0e-4 tasks.flags.epochs=2"`. Files merge in the order '
        "of `base:`, then the file itself, then the command line.",
    ]
    parts += list(_section("", ExperimentConfig))
    parts += ["## Strategies", "`strategy.name` chooses the method; the other keys of `strategy` are its own."]
    for name in sorted(STRATEGIES):
        cls = STRATEGIES.get(name)
        if not cls.__module__.startswith(f"{__package__}."):
            continue  # registered by somebody's own file
        parts += [f"### `{name}`", _first_sentence(cls), *_table("strategy.", cls.Config)]
    return "\n\n".join(parts) + "\n"


def callbacks() -> str:
    """The page of the callbacks, as Markdown."""
    package = importlib.import_module("callbacks")
    parts = [
        "# Callbacks",
        NOTE,
        "Lightning callbacks carry out the task boundaries: they choose the moment, the strategy decides what happens. An "
        "experiment lists them under `callbacks`, in the order in which they run; those of `experiments/_base/run.yaml` belong "
        "to every run. Which ones a strategy needs is checked when the configuration loads.",
    ]
    for name in sorted(package.__all__):
        cls = getattr(package, name)
        if inspect.isclass(cls) and issubclass(cls, L.Callback):
            signature = ", ".join(str(p) for p in inspect.signature(cls).parameters.values())
            parts += [f"## `callbacks.{name}({signature})`", _prose(inspect.getdoc(cls) or "")]
    return "\n\n".join(parts) + "\n"


def _section(prefix: str, cls: type) -> Iterator[str]:
    """A dataclass and, after it, the dataclasses that its fields hold."""
    title = f"`{prefix.rstrip('.')}`" if prefix else "The experiment"
    yield from (f"## {title}", inspect.getdoc(cls) or "", *_table(prefix, cls))
    for field in fields(cls):
        if isinstance(field.type, type) and is_dataclass(field.type):
            yield from _section(f"{prefix}{field.name}.", field.type)
    if cls is ExperimentConfig:
        yield from _section("tasks.<name>.", TaskConfig)


def _table(prefix: str, cls: type) -> list[str]:
    plain = [f for f in fields(cls) if not (isinstance(f.type, type) and is_dataclass(f.type))]
    if not plain:
        return ["No hyper-parameters."]
    notes = _field_notes(cls)
    rows = ["| key | type | default | |", "|---|---|---|---|"]
    for field in plain:
        cells = (f"`{prefix}{field.name}`", f"`{_type(field.type)}`", f"`{_default(field)}`", notes.get(field.name, ""))
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return ["\n".join(rows)]


def _field_notes(cls: type) -> dict[str, str]:
    """Field -> the string literal below it, of the class and its bases."""
    notes: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not is_dataclass(base):
            continue
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(node, ast.ClassDef)
        for field, note in zip(node.body, node.body[1:], strict=False):
            literal = note.value if isinstance(note, ast.Expr) else None
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(literal, ast.Constant)
                and isinstance(literal.value, str)
            ):
                notes[ast.unparse(field.target)] = " ".join(literal.value.split())
    return notes


def _type(annotation: Any) -> str:
    """The annotation as people write it: literals as their values."""
    if get_origin(annotation) is None:
        return getattr(annotation, "__name__", str(annotation))
    if "Literal" in str(get_origin(annotation)):
        return " | ".join(str(value) for value in get_args(annotation))
    return re.sub(r"\b(?:[a-z_]+\.)+(?=\w)", "", str(annotation)).replace("NoneType", "None")


def _default(field: "Field[Any]") -> str:
    """The default as YAML would have it."""
    if field.default_factory is not MISSING:
        value: Any = field.default_factory()
    else:
        value = field.default
    if value is MISSING or value == REQUIRED:
        return "???"
    return (
        {None: "null", True: "true", False: "false", "": '""'}.get(value, str(value))
        if _hashable(value)
        else str(value)
    )


def _hashable(value: Any) -> bool:
    return isinstance(value, str | bool | type(None))


def _first_sentence(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


def _prose(text: str) -> str:
    """A docstring as Markdown: `Args:` and `Raises:` become lists."""
    lines, inside = [], False
    for line in text.splitlines():
        if line.strip() in ("Args:", "Raises:", "Returns:"):
            lines += [f"{line.strip()}", ""]
            inside = True
        elif inside and line.startswith("    ") and not line.startswith("     "):
            name, colon, rest = line.strip().partition(":")
            lines.append(f"- `{name}`:{rest}" if colon else f"  {line.strip()}")
        elif inside and line.strip():
            lines.append(f"  {line.strip()}")
        else:
            inside = inside and not line.strip()
            lines.append(line)
    return "\n".join(lines).strip()


def main(arguments: list[str] | None = None) -> int:
    """Write the pages into a folder."""
    (folder,) = sys.argv[1:] if arguments is None else arguments
    for name, text in zip(PAGES, (configuration(), callbacks()), strict=True):
        (Path(folder) / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
