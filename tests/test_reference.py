"""The reference pages say what the code says."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from mcit_lightning import reference

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.mark.parametrize("page", reference.PAGES)
def test_pages_are_up_to_date(page: str, tmp_path: Path) -> None:
    assert reference.main([str(tmp_path)]) == 0
    written, kept = (tmp_path / page).read_text(encoding="utf-8"), (DOCS / page).read_text(encoding="utf-8")
    assert written == kept, f"docs/{page} is not what the code says: run `make docs`"


def test_every_key_is_explained() -> None:
    empty = re.findall(r"^\| `([^`]+)` .*\|  \|$", reference.configuration(), re.MULTILINE)
    assert not empty, f"write a docstring below each of these fields: {empty}"


@dataclass
class Inner:
    """An inner section."""

    rate: float | None = None
    """A rate | a pipe."""


@dataclass
class Outer:
    """An outer section."""

    kind: Literal["a", "b"] = "a"
    inner: Inner = field(default_factory=Inner)
    names: list[str] = field(default_factory=lambda: ["x"])
    """Some names,
    on two lines."""


def test_a_dataclass_becomes_tables() -> None:
    text = "\n".join(reference._section("", Outer))
    assert "| `kind` | `a \\| b` | `a` |  |" in text
    assert "| `names` | `list[str]` | `['x']` | Some names, on two lines. |" in text
    assert "## `inner`\nAn inner section." in text
    assert "| `inner.rate` | `float \\| None` | `null` | A rate \\| a pipe. |" in text
