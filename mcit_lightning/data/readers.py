"""Files of rows. A file is read once from end to end; afterwards only the rows' byte offsets stay in memory."""

import difflib
import json
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

from mcit_lightning.data.jsonscan import BOM, encoding_error, refuse_half_characters, scan_array, syntax_error

Format = Literal["json", "jsonl", "hf"]
Visit = Callable[[int, Any], None]
Skip = Callable[[int, ValueError], None]
ENDINGS: dict[str, Format] = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "hf"}


class Rows(Protocol):
    """Random access to the rows of one split."""

    source: str
    """File or dataset, for messages."""

    def __len__(self) -> int: ...

    def row(self, index: int) -> Any:
        """The parsed row `index`; images of a dataset come as `LazyImage`."""
        ...


class FileRows:
    """Rows of a JSON or JSON-lines file by byte offset.

    A row is read from the open file each time, so an instance costs 16 bytes a row and may be used by any number of
    loader processes, forked or spawned.
    """

    def __init__(self, path: Path, starts: array, ends: array) -> None:
        self.path = path
        self.source = str(path)
        self._starts = np.frombuffer(starts, dtype=np.int64)
        self._ends = np.frombuffer(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def row(self, index: int) -> Any:
        """The parsed row `index`."""
        start, end = int(self._starts[index]), int(self._ends[index])
        with self.path.open("rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            return json.loads(content)
        except ValueError as error:  # it was read once without
            raise ValueError(
                f"{self.source}, row {index + 1}: is no JSON any more ({error}). The file has changed since the run began; "
                "restore it and run the same command again."
            ) from None


def file_format(path: str, declared: str, key: str) -> Format:
    """The format of `path`: as declared, or by its ending.

    Raises:
        ValueError: `declared` is `auto` and the ending is unknown.
    """
    if declared != "auto":
        return cast("Format", declared)
    ending = Path(path).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(
            f"{key}: the format of {path!r} is not known from its ending ({', '.join(ENDINGS)}). "
            f"Set {key.rsplit('.', 1)[0]}.format to json, jsonl or hf."
        )
    return ENDINGS[ending]


def read_file(
    path: Path, file_format: Literal["json", "jsonl"], key: str, visit: Visit, skip: Skip | None = None
) -> FileRows:
    """Index `path`, calling `visit(index, row)` for every row while it is parsed.

    Memory: the offsets, a few MiB of the file, and what `visit` keeps.

    Args:
        path: a JSON array or JSON lines, UTF-8.
        file_format: which of the two.
        key: the configuration key that names the file, for messages.
        visit: sees each row once; whatever it raises ends the reading.
        skip: sees, in place of `visit`, the rows of a JSON-lines file that are no JSON, with the error. Without it, and in
            a JSON array, whose rows after a syntax error cannot be told apart, such a row ends the reading.

    Raises:
        ValueError: the file is missing, is not UTF-8, has a syntax error (with line and column) or no list on top.
    """
    check_file(path, key)
    starts, ends = array("q"), array("q")
    if file_format == "json":
        for index, (start, end, row) in enumerate(scan_array(path, key)):
            starts.append(start)
            ends.append(end)
            visit(index, row)
        return FileRows(path, starts, ends)
    for index, (start, end, row, error) in enumerate(_scan_lines(path, key)):
        starts.append(start)
        ends.append(end)
        if error is None:
            visit(index, row)
        elif skip is not None:
            skip(index, error)
        else:
            raise error
    return FileRows(path, starts, ends)


def check_file(path: Path, key: str) -> None:
    """Refuse a path that is no file, naming what is there under a similar name.

    Published folders are called `CLEVR` or `CLEVR-Math`, `VizWiz` or `VizWiz-caption`, depending on who copied them.

    Raises:
        ValueError: there is no such file.
    """
    if path.is_file():
        return
    there, absent = path, ""
    while not there.exists() and there != there.parent:
        there, absent = there.parent, there.name
    names = sorted(entry.name for entry in there.iterdir()) if absent and there.is_dir() else []
    starts = [name for name in names if absent.startswith(Path(name).stem) or name.startswith(Path(absent).stem)]
    close = starts or difflib.get_close_matches(absent, names, n=1)
    hint = f" {there} has {close[0]!r}, not {absent!r}." if close else ""
    raise ValueError(
        f"{key}: the file {path} does not exist.{hint} Correct {key} (it is relative to data.root) or data.root."
    )


def _scan_lines(path: Path, key: str) -> Iterator[tuple[int, int, Any, ValueError | None]]:
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start = position + (len(BOM) if number == 1 and line.startswith(BOM) else 0)
            position += len(line)
            content = line[start - (position - len(line)) :].strip()
            if not content:
                continue
            try:
                yield start, position, parse_line(content, path, key, number), None
            except ValueError as error:
                yield start, position, None, error


def parse_line(content: bytes, path: Path, key: str, number: int) -> Any:
    """The value of line `number` of a JSON-lines file.

    Raises:
        ValueError: the line is no JSON or no UTF-8; names file, line and column.
    """
    try:
        text = content.decode("utf-8")
        row = json.loads(text)
        if "\\u" in text:
            refuse_half_characters(row)
        return row
    except json.JSONDecodeError as error:
        raise syntax_error(path, key, error.msg, number, error.colno) from None
    except UnicodeDecodeError as error:
        raise encoding_error(path, key, error) from None
    except (ValueError, RecursionError) as error:
        raise syntax_error(path, key, str(error), number, 1) from None
