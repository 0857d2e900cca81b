"""`torch.compile` of the decoder's layers, for strategies whose adapters do not decide anything in Python."""

import os
import shutil
import sys
from contextlib import AbstractContextManager, nullcontext

import torch

from mcit_lightning.sharding import decoder_layers
from mcit_lightning.strategies import ContinualStrategy
from mcit_lightning.towers import Towers


def check_compile(backend: str, strategy: ContinualStrategy, name: str, *, on_cpu: bool) -> None:
    """Refuse what cannot be compiled.

    Args:
        on_cpu: the run computes on the CPU, for which `inductor` writes C++.

    Raises:
        ValueError: there is no such backend, no compiler for it, or the strategy routes samples inside of the layers.
    """
    known = torch.compiler.list_backends()
    if backend not in known and backend not in ("eager", "aot_eager"):
        raise ValueError(f"backbone.compile: no backend {backend!r}. Known: {', '.join(known)}; or null for none")
    if not strategy.compiles:
        raise ValueError(
            f"backbone.compile: strategy {name!r} decides in Python, for every batch, which branches a layer computes, so its "
            "layers would be compiled again and again. Set it to null"
        )
    if backend == "inductor" and on_cpu and shutil.which(cpp_compiler()) is None:
        raise ValueError(
            f"backbone.compile: 'inductor' needs a C++ compiler on a CPU, and there is no {cpp_compiler()!r}. Install one, name "
            "another in the environment variable CXX, or set the key to null"
        )


def cpp_compiler() -> str:
    """The C++ compiler that `inductor` calls: what the environment variable CXX says, else the system's usual one."""
    return os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")


def compile_decoder(towers: Towers, backend: str) -> None:
    """Compile each layer of the decoder by itself: layers of one form share the code.

    Called when a stage's adapters are there. What earlier stages have compiled is forgotten: their layers had another form, and
    the number of forms that are kept is limited.

    Raises:
        ValueError: the decoder has no list of layers.
    """
    torch.compiler.reset()
    layers = decoder_layers(towers)
    if not layers:
        decoder = type(towers.model.get_submodule(towers.language)).__name__
        raise ValueError(f"backbone.compile: {decoder} has no list of layers. Set it to null")
    for layer in layers:
        layer.compile(backend=backend, dynamic=True)


def eagerly(backend: str | None) -> AbstractContextManager[None]:
    """Context in which compiled layers are computed as if they were not: a generation would compile every length anew."""
    return nullcontext() if backend is None else torch.compiler.set_stance("force_eager")
