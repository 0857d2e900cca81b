"""The rules that keep the code readable: who imports whom, how long a file is, what a public name carries."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted((ROOT / "mcit_lightning").rglob("*.py"))
PACKAGES = CORE + sorted((ROOT / "callbacks").rglob("*.py"))
PYTHON = PACKAGES + sorted((ROOT / "tests").rglob("*.py"))
LONGEST = 400

Function = ast.FunctionDef | ast.AsyncFunctionDef


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(tree: ast.Module) -> Iterator[str]:
    """Every absolute module name that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def public(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, ast.ClassDef | Function]]:
    """Public classes, functions and methods with their dotted names; what is defined inside a function is private."""
    for node in body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{prefix}{node.name}.")


def decorators(node: Function) -> set[str]:
    """Last part of each decorator's name: `override`, `setter`, ..."""
    targets = [item.func if isinstance(item, ast.Call) else item for item in node.decorator_list]
    return {ast.unparse(target).rpartition(".")[2] for target in targets}


def inherits_docstring(node: ast.ClassDef | Function, dotted: str, documented: set[str]) -> bool:
    """A method that fills in one documented at its parent: ours by name, Lightning's and torch's hooks, property setters."""
    if isinstance(node, ast.ClassDef) or "." not in dotted:
        return False
    torch_hooks = {"forward", "state_dict", "load_state_dict", "extra_repr", "reset", "update", "compute"}
    lightning_hooks = {"setup", "teardown", "training_step", "validation_step", "test_step", "configure_optimizers"}
    return (
        node.name in documented | torch_hooks | lightning_hooks
        or node.name.startswith("on_")
        or node.name.endswith("_dataloader")
        or bool(decorators(node) & {"override", "overload", "setter"})
    )


def unannotated(node: Function, method: bool) -> list[str]:
    """Parameters without a type, and `return` when that has none."""
    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
    if method and "staticmethod" not in decorators(node):
        arguments = arguments[1:]
    arguments += [argument for argument in (node.args.vararg, node.args.kwarg) if argument]
    missing = [argument.arg for argument in arguments if argument.annotation is None]
    return missing if node.returns else [*missing, "return"]


@pytest.mark.parametrize("path", CORE, ids=name)
def test_core_does_not_import_callbacks(path: Path) -> None:
    assert [module for module in imported(parse(path)) if module.split(".")[0] == "callbacks"] == []


@pytest.mark.parametrize("path", PYTHON, ids=name)
def test_file_is_short_and_named_for_what_it_does(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
    assert path.stem not in {"utils", "util", "helpers", "common", "misc"}


@pytest.mark.parametrize("path", PACKAGES, ids=name)
def test_package_code_logs_instead_of_printing(path: Path) -> None:
    calls = (node for node in ast.walk(parse(path)) if isinstance(node, ast.Call))
    assert [node.lineno for node in calls if isinstance(node.func, ast.Name) and node.func.id == "print"] == []


@pytest.fixture(scope="module")
def documented() -> set[str]:
    """Names of the methods that some class of the packages documents."""
    nodes = [item for path in PACKAGES for item in public(parse(path).body)]
    return {node.name for dotted, node in nodes if "." in dotted and ast.get_docstring(node)}


@pytest.mark.parametrize("path", PACKAGES, ids=name)
def test_public_names_have_docstrings(path: Path, documented: set[str]) -> None:
    tree = parse(path)
    missing = [
        dotted
        for dotted, node in public(tree.body)
        if not ast.get_docstring(node) and not inherits_docstring(node, dotted, documented)
    ]
    if tree.body and not ast.get_docstring(tree):
        missing.insert(0, "the module")
    assert missing == []


@pytest.mark.parametrize("path", PACKAGES, ids=name)
def test_public_functions_are_annotated(path: Path) -> None:
    functions = [(dotted, node) for dotted, node in public(parse(path).body) if not isinstance(node, ast.ClassDef)]
    missing = {dotted: names for dotted, node in functions if (names := unannotated(node, "." in dotted))}
    assert missing == {}


def test_tracked_files_name_no_machine() -> None:
    """No home or work folder of some machine and no package index: the files must mean the same everywhere."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    folders = r"/(?:home|Users|root|work|mnt|opt|scratch)/\w"
    indexes = r"pypi\.org|pythonhosted\.org|--(?:extra-)?index-url|--find-links|download\.pytorch\.org"
    builds = r"==[\w.]+\+cpu|==[\w.]+\+cu\d"
    pattern = re.compile("|".join((folders, indexes, builds)))
    found = []
    for file in filter(None, listing.stdout.split("\0")):
        path = ROOT / file
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue  # pictures and weights
        found += [f"{file}:{number}: {line.strip()}" for number, line in enumerate(lines, 1) if pattern.search(line)]
    assert found == []
