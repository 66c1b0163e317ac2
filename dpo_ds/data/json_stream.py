"""A JSON array read element by element, so that a file larger than memory can be read."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import DataError

CHUNK = 1 << 20  # bytes
CUT_OFF = 16  # characters: an error this near the end of what is read may be a token cut by it, such as "\u12"
DECODER = json.JSONDecoder()


class JsonArray:
    """The elements of the array in `stream` (UTF-8). Anything that is not an array of JSON values to its end raises DataError."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.stream = stream
        self.path = path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""  # read and not yet consumed, but for the first `at` characters
        self.at = 0
        self.bytes_read = 0
        self.line, self.column = 1, 1  # of text[0]

    def elements(self) -> Iterator[tuple[int, Any]]:
        """(number from 1, value)."""
        self._expect("[")
        number = 0
        if self._peek() == "]":
            self.at += 1
        else:
            while number == 0 or self._expect(",]") == ",":
                number += 1
                yield number, self._value()
        if self._peek():
            raise self._error(f"text follows the array's end: {self.text[self.at : self.at + 20]!r}", self.at)

    def _expect(self, wanted: str) -> str:
        found = self._peek()
        if found and found in wanted:
            self.at += 1
            return found
        if not found:
            raise self._cut_short()
        raise self._error(f"expected {' or '.join(wanted)}, found {found!r}", self.at)

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            while self.at < len(self.text):
                if self.text[self.at] not in " \t\r\n\ufeff":
                    return self.text[self.at]
                self.at += 1
            if not self._more():
                return ""

    def _value(self) -> Any:
        if not self._peek():
            raise self._cut_short()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                unfinished = error.msg.startswith("Unterminated") or error.pos >= len(self.text) - CUT_OFF
                if unfinished and self._more():
                    continue
                if unfinished and error.pos >= len(self.text) or error.msg.startswith("Unterminated"):
                    raise self._cut_short() from error
                raise self._error(error.msg, error.pos) from error
            if end < len(self.text) or not self._more():  # a number at the end may go on
                self.at = end
                return value

    def _more(self) -> bool:
        """Reads on: at least as much again as is held, so that a long element is not scanned too often."""
        consumed, held = self.text[: self.at], self.text[self.at :]
        chunk = self.stream.read(max(CHUNK, len(held)))
        try:
            pending = len(self.decoder.getstate()[0])
            new = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = self.bytes_read - pending + error.start
            raise DataError(f"{self.path}: not UTF-8 at byte {offset} (0x{error.object[error.start]:02x}); save it as UTF-8") from error
        self.bytes_read += len(chunk)
        self.line, self.column = self._place(self.at) if consumed else (self.line, self.column)
        self.text, self.at = held + new, 0
        return bool(chunk)

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of text[at]."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, at - self.text.rfind("\n", 0, at) if lines else self.column + at

    def _error(self, problem: str, at: int) -> DataError:
        line, column = self._place(at)
        return DataError(f"{self.path}:{line}: not JSON at column {column}: {problem}; a .json file is an array of objects or JSON lines")

    def _cut_short(self) -> DataError:
        line, column = self._place(len(self.text))
        return DataError(f"{self.path}:{line}: ends at column {column} in the middle of the array: it was cut short; copy it again")
