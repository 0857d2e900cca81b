"""A wheel holds what the repository holds: code, experiments, data files and the command."""

import subprocess
import sys
from pathlib import Path
from shutil import copytree, ignore_patterns
from zipfile import ZipFile

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
DATA = {".html", ".json", ".safetensors"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """A wheel built from a copy, so that no build folder of an earlier day ends up in it, nor in the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("mcit_lightning", "callbacks", "experiments"):
        if (ROOT / name).is_dir():
            copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file() and path.name in {"setup.cfg", "pyproject.toml", "README.md", "LICENSE"}:
            (source / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "."]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder)], cwd=source, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return ZipFile(built)


def files(folder: str, suffixes: set[str]) -> set[str]:
    """Files of the repository below `folder` with one of the suffixes, as posix paths."""
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}


def test_wheel_has_all_code_and_data(wheel: ZipFile) -> None:
    expected = files("mcit_lightning", {".py"} | DATA) | files("callbacks", {".py"}) | files("experiments", {".yaml"})
    assert {"mcit_lightning/__init__.py", "callbacks/__init__.py", "experiments/quickstart.yaml"} <= expected
    assert expected - set(wheel.namelist()) == set()


def test_wheel_has_nothing_else(wheel: ZipFile) -> None:
    folders = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in folders if not name.endswith(".dist-info")} == {
        "mcit_lightning",
        "callbacks",
        "experiments",
    }
    assert [name for name in wheel.namelist() if "__pycache__" in name] == []


def test_wheel_metadata(wheel: ZipFile) -> None:
    info = {name.split("/", 1)[1]: name for name in wheel.namelist() if ".dist-info/" in name}
    assert "mcit-lightning = mcit_lightning.__main__:main" in wheel.read(info["entry_points.txt"]).decode()
    metadata = wheel.read(info["METADATA"]).decode()
    assert "Requires-Python: >=3.10" in metadata
    assert "Provides-Extra: quickstart" in metadata
    assert any(name.endswith("LICENSE") for name in info)


def test_experiments_are_found_from_an_installed_wheel(wheel: ZipFile, tmp_path: Path) -> None:
    """Unpacked into a folder of its own, as pip does, the package finds the experiments beside itself."""
    wheel.extractall(tmp_path / "site")
    code = "from mcit_lightning.loading import find_experiment; import sys; sys.stdout.write(str(find_experiment('quickstart')))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout) == tmp_path / "site" / "experiments" / "quickstart.yaml"
