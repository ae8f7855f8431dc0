"""Reads JSON files that are too large for memory: their lists entry by entry, in the memory of one entry.

ijson reads such files as fast, but its C parser turns half a surrogate pair into "?" without a word, where readers here
reject the text; and it gives the entries of one list whose path is known, not of all lists in one pass.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tokenpacker.data.rows import RecordError, parse_row

CHUNK = 1 << 20  # characters that are read at a time, at least
LARGEST_ENTRY = 1 << 28  # characters; a longer entry means a damaged file, and would fill the memory
LOOK_AHEAD = 3  # characters behind a value: 12 may go on as 12.5 or 12e-3 behind the window
_SPACE = re.compile(r"[ \t\r\n]*")
_SCAN = json.JSONDecoder().raw_decode


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, entry) for each entry of each list in the file's object, and (key, value) for its other values.

    A file that is one list gives its entries with an empty key.

    Raises:
        ValueError: for a file that is missing, not UTF-8 or not JSON, with the place.
    """
    if not path.is_file():
        raise ValueError(f"annotations {path} do not exist; check the path")
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(path, file)
        try:
            if text.next() == "[":
                for _ in text.members("[", "]"):
                    yield "", text.value()
            elif text.next() == "{":
                for _ in text.members("{", "}"):
                    key = text.key()
                    if text.next() == "[":
                        for _ in text.members("[", "]"):
                            yield key, text.value()
                    else:
                        yield key, text.value()
            else:
                text.fail("a list or an object is due")
            if text.next():
                text.fail("something follows the end")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error.reason}); fetch it again") from None


def is_list(path: Path) -> bool:
    """Whether a file is one list, not an object with entries. Raises ValueError if it is no valid JSON."""
    first = next(read_entries(path), None)
    return first is None or first[0] == ""


def read_list(path: Path) -> Iterator[Any]:
    """The entries of a file that is one list. Raises ValueError for invalid JSON and for an object."""
    for key, entry in read_entries(path):
        if key:
            raise ValueError(f"{path} holds an object with {key!r}, where a list is due; check the format's name")
        yield entry


def read_lines(path: Path) -> Iterator[Any | RecordError]:
    """The value of each line of a JSONL file, or a RecordError. Raises ValueError if there is no such file."""
    if not path.is_file():
        raise ValueError(f"annotations {path} do not exist; check the path")
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.isspace():
                continue
            try:
                yield parse_row(line, f"line {number}")
            except RecordError as error:
                yield error


class _Text:
    """A window on a text file, moved along as values are taken out of it."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._window, self._place, self._before, self._ended = "", 0, 0, False

    def next(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            match = _SPACE.match(self._window, self._place)
            assert match is not None  # the pattern matches an empty text
            self._place = match.end()
            if self._place < len(self._window) or not self._more():
                return self._window[self._place : self._place + 1]

    def take(self, character: str) -> None:
        """Moves behind a character that must come next."""
        if self.next() != character:
            self.fail(f"{character!r} is missing")
        self._place += 1

    def members(self, opening: str, closing: str) -> Iterator[None]:
        """Stops before each member of the list or object that comes next; the caller takes the member."""
        self.take(opening)
        while self.next() != closing:
            yield
            if self.next() != closing:
                self.take(",")
                if self.next() == closing:
                    self.fail("a comma stands before the end")
        self.take(closing)

    def key(self) -> str:
        """The next key, with its colon."""
        key = self.value()
        if not isinstance(key, str):
            self.fail("a key is no text")
        self.take(":")
        return key

    def value(self) -> Any:
        """The next value, whole."""
        self.next()
        while True:
            problem = ""
            try:
                value, end = _SCAN(self._window, self._place)
            except json.JSONDecodeError as error:
                problem = error.msg
            except (RecursionError, ValueError) as error:  # thousands of brackets, integers of thousands of digits
                self.fail(f"no usable value ({error})")
            if not problem and (end + LOOK_AHEAD < len(self._window) or not self._more()):
                self._place = end
                return value
            if problem and (len(self._window) - self._place > LARGEST_ENTRY or not self._more()):
                self.fail(problem)

    def fail(self, what: str) -> NoReturn:
        """Raises ValueError with the place."""
        raise ValueError(
            f"{self._path} is no valid JSON after {self._before + self._place:,} characters: {what}; fetch it again"
        )

    def _more(self) -> bool:
        """Reads on, at least as much as is waiting, so that a long value is scanned a few times only."""
        rest = self._window[self._place :]
        read = "" if self._ended else self._file.read(max(CHUNK, len(rest)))
        if not read:
            self._ended = True
            return False
        self._before += self._place
        self._window, self._place = rest + read, 0
        return True
