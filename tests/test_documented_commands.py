"""The commands of the pages are right: what `make exp` and `make sweep` get there is a configuration."""

import re
import shlex
from pathlib import Path

import pytest

from mcit_lightning.commands import find_command
from mcit_lightning.commands.sweep import make_plan, names
from mcit_lightning.loading import find_experiment, load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OWN = ("imports=", "EXP=my_")
"""Of commands for a file that the reader has written; the pages with these files have tests of their own."""
ABSENT = ("backbone.quantization=",)
"""Needs a GPU."""


def commands() -> list[tuple[str, str]]:
    """`(page, command)`, each once."""
    found: dict[str, str] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^\$ (make (?:exp|sweep)\b.*)$", text, re.M):
            if not any(word in line for word in (*OWN, *ABSENT)):
                found.setdefault(line, page.name)
    return [(page, line) for line, page in found.items()]


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_is_a_configuration(page: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = shlex.split(line, comments=True)
    given = dict(word.split("=", 1) for word in words[2:])
    assert given.keys() <= {"EXP", "ARGS"}, line
    experiment, settings = given.get("EXP", "quickstart"), shlex.split(given.get("ARGS", ""))
    if words[1] == "exp":
        load_config(find_experiment(experiment), [*settings, "dry_run=true"])
    else:
        command, rest = find_command(["sweep", experiment, *settings])
        options = command.parser().parse_intermixed_args(rest)
        plan, own = make_plan(options.plan, options.settings)
        assert plan.cells(tmp_path, names(own.get("only", "")))


def test_there_are_commands() -> None:
    assert len(commands()) > 20
