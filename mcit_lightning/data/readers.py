"""Files of rows. A file is read once from end to end; afterwards only the rows' byte offsets stay in memory."""

import json
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np

Format = Literal["json", "jsonl", "hf"]
Visit = Callable[[int, Any], None]
ENDINGS: dict[str, Format] = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "hf"}
BOM = b"\xef\xbb\xbf"

_SPACE = re.compile(r"[ \t\r\n]*")


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
            return json.loads(file.read(end - start))


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


def read_file(path: Path, file_format: Literal["json", "jsonl"], key: str, visit: Visit) -> FileRows:
    """Index `path`, calling `visit(index, row)` for every row while it is parsed.

    Args:
        path: a JSON array or JSON lines, UTF-8.
        file_format: which of the two.
        key: the configuration key that names the file, for messages.
        visit: sees each row once; whatever it raises ends the reading.

    Raises:
        ValueError: the file is missing, is not UTF-8, has a syntax error (with line and column) or no list on top.
    """
    if not path.is_file():
        raise ValueError(
            f"{key}: the file {path} does not exist. Correct {key} (it is relative to data.root) or data.root."
        )
    scan = _scan_json if file_format == "json" else _scan_lines
    starts, ends = array("q"), array("q")
    for index, (start, end, row) in enumerate(scan(path, key)):
        starts.append(start)
        ends.append(end)
        visit(index, row)
    return FileRows(path, starts, ends)


def _scan_lines(path: Path, key: str) -> Iterator[tuple[int, int, Any]]:
    position = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            start = position + (len(BOM) if number == 1 and line.startswith(BOM) else 0)
            position += len(line)
            content = line[start - (position - len(line)) :].strip()
            if not content:
                continue
            try:
                row = json.loads(content)
            except json.JSONDecodeError as error:
                raise _syntax_error(path, key, error.msg, number, error.colno) from None
            except UnicodeDecodeError as error:
                raise _encoding_error(path, key, error) from None
            yield start, position, row


def _scan_json(path: Path, key: str) -> Iterator[tuple[int, int, Any]]:
    content = path.read_bytes()
    offset = len(BOM) if content.startswith(BOM) else 0
    try:
        text = content[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _encoding_error(path, key, error) from None
    del content
    position = 0
    try:
        for start, end, row in _elements(text, path, key):
            # Character positions become byte positions: rows may hold any language.
            offset += len(text[position:start].encode("utf-8"))
            length = len(text[start:end].encode("utf-8"))
            yield offset, offset + length, row
            offset += length
            position = end
    except json.JSONDecodeError as error:
        raise _syntax_error(path, key, error.msg, error.lineno, error.colno) from None


def _elements(text: str, path: Path, key: str) -> Iterator[tuple[int, int, Any]]:
    """The elements of the array in `text` with their character spans, without holding more than one of them."""
    position = _skip_space(text, 0)
    if text[position : position + 1] != "[":
        json.loads(text)  # a syntax error is the better message
        raise ValueError(
            f"{path} ({key}): the top level is not a list. The file must be one JSON array of rows; for one row per "
            f"line set {key.rsplit('.', 1)[0]}.format to jsonl."
        )
    decoder = json.JSONDecoder()
    position = _skip_space(text, position + 1)
    closed = text[position : position + 1] == "]"
    while not closed:
        row, end = decoder.raw_decode(text, position)
        yield position, end, row
        position = _skip_space(text, end)
        separator = text[position : position + 1]
        if separator not in {",", "]"}:
            raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
        closed = separator == "]"
        if not closed:
            position = _skip_space(text, position + 1)
    position = _skip_space(text, position + 1)
    if position != len(text):
        raise json.JSONDecodeError("Extra data", text, position)


def _skip_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _syntax_error(path: Path, key: str, message: str, line: int, column: int) -> ValueError:
    return ValueError(
        f"{path} ({key}): JSON syntax error in line {line}, column {column}: {message}. Correct the file; "
        f"`format` json means one array, jsonl one object per line."
    )


def _encoding_error(path: Path, key: str, error: UnicodeDecodeError) -> ValueError:
    return ValueError(f"{path} ({key}): not UTF-8 text ({error.reason}). Save the file as UTF-8.")
