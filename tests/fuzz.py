"""Malformed inputs, made from whole ones with a seed, and what must come of reading them."""

import os
import random
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS, PATIENCE = 10, 120
"""Seconds of computation, and by the clock, that no single input may take longer than; a busy machine makes the latter long."""
REMEDY = re.compile(
    r"\b(add|choose|correct|delete|did you mean|give|install|known|lower|make|must|name|needs?|overwrite|put|raise|remove|"
    r"check|continue|replace|restore|save|set|start|undo|use|valid|write)\b",
    re.IGNORECASE,
)
RIGHT = re.compile(
    r"is a text or a number|is a number or a text|not a text|has `|has one of|A turn is|A prediction is|References are|"
    r"Answers are|not a COCO"
)
"""A message has a word that says what to do, or says what would be right."""


class TooLong(BaseException):
    """Not an Exception, so that no reader handles it."""


def byte_mutations(whole: bytes, seed: str, count: int) -> Iterator[tuple[str, bytes]]:
    """Copies of a file's content that are cut, garbled, doubled, emptied or in another encoding."""
    draw = random.Random(seed)
    text = whole.decode("utf-8", "replace")
    yield "empty", b""
    yield "one zero byte", b"\0"
    yield "utf-16", text.encode("utf-16")
    yield "latin-1 inside", whole[: len(whole) // 2] + b"\xe9\xff" + whole[len(whole) // 2 :]
    yield "byte order mark", b"\xef\xbb\xbf" + whole
    yield "twice", whole * 2
    yield "zeros", b"\0" * len(whole)
    for number in range(count):
        content, place = bytearray(whole), draw.randrange(max(len(whole), 1))
        kind = draw.choice(["cut", "flip", "noise", "gap", "copy", "number", "bracket"])
        if kind == "cut":
            del content[place:]
        elif kind == "flip":
            for _ in range(draw.randint(1, 4)):
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        elif kind == "noise":
            content[place:place] = draw.randbytes(draw.randint(1, 40))
        elif kind == "gap":
            del content[place : place + draw.randint(1, 60)]
        elif kind == "copy":
            content[place:place] = content[: draw.randint(1, 200)]
        elif kind == "number":
            content = bytearray(
                re.sub(rb"\d+", lambda _: draw.choice([b"1e999", b"-1", b"NaN", b"9" * 40]), whole, count=3)
            )
        else:
            content[place : place + 1] = draw.choice([b"{", b"}", b"[", b"]", b'"', b":", b"\n", b"&a", b"*a"])
        yield f"{kind} {number}", bytes(content)


def strange_places(path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Things other than a file that `path` can be; each is made by a call."""
    yield "missing", lambda: None
    yield "folder", path.mkdir
    yield "link to itself", lambda: path.symlink_to(path)
    yield "link to nowhere", lambda: path.symlink_to(path.with_name("nowhere"))
    yield "pipe", lambda: os.mkfifo(path)
    if os.geteuid() != 0:
        yield "no permission", lambda: (path.write_text("{}"), path.chmod(0))  # type: ignore[func-returns-value]


def put(path: Path, content: bytes | Callable[[], None]) -> None:
    """Make `path` what a mutation says, whatever it was."""
    if path.is_symlink() or path.exists():
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    path.write_bytes(content) if isinstance(content, bytes) else content()


@contextmanager
def in_time() -> Iterator[None]:
    """Raise `TooLong` if the block takes too long."""

    def late(signum: int, frame: Any) -> None:
        raise TooLong

    before = {signum: signal.signal(signum, late) for signum in (signal.SIGALRM, signal.SIGPROF)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for signum, handler in before.items():
            signal.signal(signum, handler)


def problem(read: Callable[[], Any], *names: str) -> str | None:
    """What is wrong with how malformed input is dealt with; None if it is accepted, or refused as it should be.

    Args:
        read: reads it.
        names: one of them must be in the message.
    """
    try:
        with in_time():
            read()
    except TooLong:
        return "took too long"
    except ValueError as error:
        text = str(error)
        if not type(error).__module__.startswith("mcit_lightning") and type(error) is not ValueError:
            return f"{type(error).__name__}: {text[:300]}"
        if not any(name in text for name in names):
            return f"names none of {names}: {text[:300]}"
        if not (REMEDY.search(text) or RIGHT.search(text)):
            return f"has no remedy: {text[:300]}"
        if len(text) > 2000:
            return f"is {len(text)} characters long: {text[:300]}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]}"
    return None


def content_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, to see that reading has lost nothing."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path)] = os.readlink(path).encode()
        elif path.is_file():
            found[str(path)] = path.read_bytes()
    return found
