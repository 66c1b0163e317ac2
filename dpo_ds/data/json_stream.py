"""A JSON array read element by element, so that a file larger than memory can be read.

Each element is read by Python's own json, as lines of JSON are. Why not by ijson (3.6): its C backend turns half a
surrogate pair into "?" and crashes the process on a whole number of 5,000 digits; its Python backend is 11 times
slower, takes no NaN, and cannot go on behind an element that is not readable.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from dpo_ds.data.rows import BadRow, unique_keys, unreadable
from dpo_ds.errors import DataError

CHUNK = 1 << 20  # bytes
MAX_BLANK = 1 << 26  # characters between two values: a few bytes of gzip unpack to billions
CUT_OFF = 16  # characters: an error this near the end of what is read may be a token cut by it, such as "\u12"
NO_SPACE = re.compile(r"[^ \t\r\n\ufeff]")
DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)
STRING_OR_MARK = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{},]', re.DOTALL)


class JsonArray:
    """The elements of the array in `stream` (UTF-8); DataError where it is not one array of JSON values to its end."""

    def __init__(self, stream: BinaryIO, path: Path):
        self.stream = stream
        self.path = path
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""  # read and not yet consumed, but for the first `at` characters
        self.at = 0
        self.bytes_read = 0
        self.line, self.column = 1, 1  # of text[0]

    def elements(self) -> Iterator[tuple[int, Any]]:
        """(number from 1, value), a BadRow for a value that Python cannot hold."""
        self._expect("[")
        number = 0
        if self._peek() == "]":
            self.at += 1
        else:
            while number == 0 or self._expect(",]") == ",":
                if number and self._peek() == "]":
                    raise self._error("a comma stands before the closing ]; remove it", self.at)
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
        blank = 0
        while True:
            found = NO_SPACE.search(self.text, self.at)
            blank, self.at = blank - self.at, found.start() if found else len(self.text)
            blank += self.at
            if blank > MAX_BLANK:
                raise self._error(f"{blank >> 20} MiB of white space", self.at)
            if found or not self._more():
                return self.text[self.at : self.at + 1]

    def _value(self) -> Any:
        if not self._peek():
            raise self._cut_short()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.at)
            except json.JSONDecodeError as error:
                in_string, offset = error.msg.startswith("Unterminated"), error.pos - self.at
                if (in_string or error.pos >= len(self.text) - CUT_OFF) and self._more():
                    continue
                if in_string or self.at + offset >= len(self.text):
                    raise self._cut_short() from error
                raise self._error(error.msg, self.at + offset) from error
            except BadRow as error:
                self._skip_value()
                return error
            except (ValueError, RecursionError) as error:
                self._skip_value()
                return unreadable(error)
            length = end - self.at
            if end < len(self.text) or not self._more():  # a number at the end may go on
                self.at += length
                return value

    def _skip_value(self) -> None:
        """Moves on to the comma or bracket that ends the element."""
        while True:
            depth = 0
            for found in STRING_OR_MARK.finditer(self.text, self.at):
                mark = found[0][0]
                if depth == 0 and mark in ",]":
                    self.at = found.start()
                    return
                depth += (mark in "[{") - (mark in "]}")
            if not self._more():
                raise self._cut_short()

    def _more(self) -> bool:
        """Reads on: at least as much again as is held, so that a long element is not scanned too often."""
        held = self.text[self.at :]
        chunk = self.stream.read(max(CHUNK, len(held)))
        try:
            pending = len(self.decoder.getstate()[0])
            new = self.decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            offset = self.bytes_read - pending + error.start
            found = f"0x{error.object[error.start]:02x}"
            raise DataError(f"{self.path}: not UTF-8 at byte {offset} ({found}); save the file as UTF-8") from error
        self.bytes_read += len(chunk)
        self.line, self.column = self._place(self.at)
        self.text, self.at = held + new, 0
        return bool(chunk)

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column, from 1, of text[at]."""
        lines = self.text.count("\n", 0, at)
        return self.line + lines, at - self.text.rfind("\n", 0, at) if lines else self.column + at

    def _error(self, problem: str, at: int) -> DataError:
        line, column = self._place(at)
        rule = "a .json file is an array of objects, or JSON lines"
        return DataError(f"{self.path}:{line}: not JSON at column {column}: {problem}; {rule}")

    def _cut_short(self) -> DataError:
        line, column = self._place(len(self.text))
        problem = f"the file ends at column {column}, in the middle of the array"
        return DataError(f"{self.path}:{line}: {problem}; copy it again in full")
