"""JSON files that are too large to be read whole: their lists, entry by entry, in the memory of one entry."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn, TextIO

from tokenpacker.data.rows import RecordError, parse_row

CHUNK = 1 << 20  # characters that are read at a time, at least
LARGEST_ENTRY = 1 << 28  # characters; a list entry beyond that is a damaged file, and would fill the memory
LOOK_AHEAD = 3  # signs behind a value: what looks like 12 may go on as 12.5 or 12e-3 behind the window
_SPACE = re.compile(r"[ \t\r\n]*")
_SCAN = json.JSONDecoder().raw_decode


def read_entries(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, entry) for each entry of each list in the file's object, and (key, value) for its other values.

    Of a file that is one list: its entries, with an empty key.

    Raises:
        ValueError: for a file that is missing, no UTF-8 text or no JSON, with the place.
    """
    if not path.is_file():
        raise ValueError(f"annotations {path} do not exist; check the path")
    with path.open(encoding="utf-8-sig") as file:
        text = _Text(path, file)
        try:
            if text.sign() == "[":
                for entry in text.list_entries():
                    yield "", entry
            elif text.sign() == "{":
                yield from _object_entries(text)
            else:
                text.fail("a list or an object is due")
            if text.sign():
                text.fail("something follows the end")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is no UTF-8 text ({error.reason}); fetch it again") from None


def read_lines(path: Path) -> Iterator[Any | RecordError]:
    """The value of each line of a JSONL file; RecordError for a line that is no JSON. Raises ValueError without it."""
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


def read_list(path: Path) -> Iterator[Any]:
    """The entries of a file that is one list. Raises ValueError as `read_entries`, and for an object."""
    for key, entry in read_entries(path):
        if key:
            raise ValueError(f"{path} holds an object with {key!r}, where a list is due; check the format's name")
        yield entry


def _object_entries(text: _Text) -> Iterator[tuple[str, Any]]:
    text.take("{")
    while text.sign() != "}":
        key = text.value()
        if not isinstance(key, str):
            text.fail("a key is no text")
        text.take(":")
        if text.sign() == "[":
            for entry in text.list_entries():
                yield key, entry
        else:
            yield key, text.value()
        if text.sign() != "}":
            text.take(",")
    text.take("}")


class _Text:
    """A window on a text file, moved along as values are taken out of it."""

    def __init__(self, path: Path, file: TextIO) -> None:
        self._path, self._file = path, file
        self._window, self._place, self._before, self._ended = "", 0, 0, False

    def sign(self) -> str:
        """The next sign that is no space; "" at the end."""
        while True:
            match = _SPACE.match(self._window, self._place)
            assert match is not None  # it matches nothing, too
            self._place = match.end()
            if self._place < len(self._window) or not self._more():
                return self._window[self._place : self._place + 1]

    def take(self, sign: str) -> None:
        """Goes past a sign that must come next."""
        if self.sign() != sign:
            self.fail(f"{sign!r} is missing")
        self._place += 1

    def value(self) -> Any:
        """The next value, whole."""
        self.sign()
        while True:
            value, end, problem = self._scan()
            if problem is None and (end + LOOK_AHEAD < len(self._window) or not self._more()):
                break
            if problem is not None and (len(self._window) - self._place > LARGEST_ENTRY or not self._more()):
                self.fail(problem)
        self._place = end
        return value

    def _scan(self) -> tuple[Any, int, str | None]:
        """The value here and where it ends, or what is wrong with it."""
        try:
            return *_SCAN(self._window, self._place), None
        except json.JSONDecodeError as error:
            return None, self._place, error.msg
        except (RecursionError, ValueError) as error:  # thousands of brackets, integers of thousands of digits
            self.fail(f"no usable value ({error})")

    def list_entries(self) -> Iterator[Any]:
        """The entries of the list that comes next."""
        self.take("[")
        while self.sign() != "]":
            yield self.value()
            if self.sign() != "]":
                self.take(",")
                if self.sign() == "]":
                    self.fail("a comma stands before the end of a list")
        self.take("]")

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
