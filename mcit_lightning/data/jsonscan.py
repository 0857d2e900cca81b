"""The elements of a JSON array of any size, a few MiB at a time."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

BOM = b"\xef\xbb\xbf"
CHUNK = 2**22
"""Bytes that are read at a time. A row longer than that is read whole."""
LONGEST_TOKEN = 16
"""Characters before the end of what was read in which a syntax error may mean that the rest is still to be read."""

_SPACE = re.compile(r"[ \t\r\n]*")


def scan_array(path: Path, key: str, chunk: int = CHUNK) -> Iterator[tuple[int, int, Any]]:
    """The elements of the array that a file holds, as first byte, byte after the last and value.

    Args:
        path: the file, UTF-8, with or without a byte order mark.
        key: the configuration key that names the file, for messages.
        chunk: bytes to read at a time.

    Raises:
        ValueError: the file is not UTF-8, has a syntax error (with line and column) or no list on top.
    """
    with path.open("rb") as file:
        window = _Window(file, chunk)
        try:
            window.more()
            yield from _elements(window, path, key)
        except json.JSONDecodeError as error:
            line, column = window.place(error.pos)
            raise syntax_error(path, key, error.msg, line, column) from None
        except UnicodeDecodeError as error:
            raise encoding_error(path, key, error) from None


class _Window:
    """The part of a file that is being parsed: `text`, of which everything before `position` is done with."""

    def __init__(self, file: BinaryIO, chunk: int) -> None:
        self.text = ""
        self.position = 0
        self._file = file
        self._chunk = chunk
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._line, self._column = 1, 1
        self._finished = False
        self._byte = len(BOM) if file.read(len(BOM)) == BOM else 0  # where `_counted` is in the file
        self._counted = 0
        file.seek(self._byte)

    def more(self) -> bool:
        """Drop what is done with and read on; False at the end of the file."""
        content = b"" if self._finished else self._file.read(max(self._chunk, len(self.text) - self.position))
        if not content:
            self._finished = True
            self._decoder.decode(b"", final=True)
            return False
        self.byte(self.position)
        self._line, self._column = self.place(self.position)
        self.text = self.text[self.position :] + self._decoder.decode(content)
        self.position = self._counted = 0
        return True

    def byte(self, position: int) -> int:
        """Where a character of `text` stands in the file. Positions must be asked for in ascending order."""
        part = self.text[self._counted : position]
        self._byte += len(part) if part.isascii() else len(part.encode("utf-8"))
        self._counted = position
        return self._byte

    def place(self, position: int) -> tuple[int, int]:
        """Line and column of a character of `text`, from 1."""
        text = self.text[:position]
        lines = text.count("\n")
        return self._line + lines, len(text) - text.rfind("\n") if lines else self._column + len(text)

    def skip_space(self) -> str:
        """Go to the next character that is no blank; empty at the end of the file."""
        while True:
            char = self.text[self.position : self.position + 1]
            if char and char not in " \t\r\n":
                return char
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position == len(self.text) and not self.more():
                return ""


def _elements(window: _Window, path: Path, key: str) -> Iterator[tuple[int, int, Any]]:
    decoder = json.JSONDecoder()
    first = window.skip_space()
    if first != "[":
        _value(window, decoder, path, key)  # a syntax error is the better message
        raise ValueError(
            f"{path} ({key}): the top level is not a list. The file must be one JSON array of rows; for one row per "
            f"line set {key.rsplit('.', 1)[0]}.format to jsonl."
        )
    window.position += 1
    closed = window.skip_space() == "]"
    while not closed:
        row, end = _value(window, decoder, path, key)
        start = window.byte(window.position)
        if "\\u" in window.text[window.position : end]:
            _checked(row, window, path, key)
        yield start, window.byte(end), row
        window.position = end
        separator = window.skip_space()
        if separator not in ("]", ","):
            raise json.JSONDecodeError("Expecting ',' delimiter", window.text, window.position)
        closed = separator == "]"
        if not closed:
            window.position += 1
            window.skip_space()
    window.position += 1
    if window.skip_space():
        raise json.JSONDecodeError("Extra data", window.text, window.position)


def _value(window: _Window, decoder: json.JSONDecoder, path: Path, key: str) -> tuple[Any, int]:
    """The value at the window's position and where it ends, reading on where the file goes on."""
    while True:
        try:
            row, end = decoder.raw_decode(window.text, window.position)
        except json.JSONDecodeError as error:
            cut = error.pos >= len(window.text) - LONGEST_TOKEN or error.msg.startswith("Unterminated string")
            if not (cut and window.more()):
                raise
            continue
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
            raise syntax_error(path, key, str(error), *window.place(window.position)) from None
        # A number may go on in what is still to be read; "1e" and "1e-" are read as 1 and a rest.
        if not isinstance(row, int | float) or end + 2 < len(window.text) or not window.more():
            return row, end


def _checked(row: Any, window: _Window, path: Path, key: str) -> None:
    try:
        refuse_half_characters(row)
    except ValueError as error:
        raise syntax_error(path, key, str(error), *window.place(window.position)) from None


def refuse_half_characters(value: Any) -> None:
    r"""Refuse texts that no file can hold, which JSON can write as `\ud83d` without its other half.

    Raises:
        ValueError: there is one.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"half of a surrogate pair ({error.object[error.start]!a})") from None


def syntax_error(path: Path, key: str, message: str, line: int, column: int) -> ValueError:
    """The error for a file that is no JSON at a place."""
    return ValueError(
        f"{path} ({key}): JSON syntax error in line {line}, column {column}: {message}. Correct the file; "
        f"`format` json means one array, jsonl one object per line."
    )


def encoding_error(path: Path, key: str, error: UnicodeDecodeError) -> ValueError:
    """The error for a file that is not UTF-8."""
    return ValueError(f"{path} ({key}): not UTF-8 text ({error.reason}). Save the file as UTF-8.")
