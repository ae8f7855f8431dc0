"""Where a benchmark's files lie, and their rows with the place of each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import starmap
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations.entries import read_entries
from tokenpacker.data.rows import RecordError, parse_row
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.text import LONE_SURROGATE

Questions = Iterator[BenchQuestion | RecordError]
"""Questions in the files' order, and an error for each row that is none."""


@dataclass(frozen=True)
class BenchmarkFiles:
    """The files of one split of a benchmark.

    Args:
        questions: the question file.
        images: folder of the images.
        annotations: file or folder with the references; None where they are in the question file, or only a server
            has them.
    """

    questions: Path
    images: Path
    annotations: Path | None = None

    def image(self, name: str) -> str:
        """The path of an image. A text takes a quarter of a Path's memory, and VQAv2 has half a million."""
        return os.path.join(self.images, name)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the files of one split are expected below a benchmark's folder, and how they are read.

    Args:
        split: name of the split.
        questions: the question file; a pattern takes the first match by name.
        images: folders of the images; the first that exists is taken.
        annotations: files or folders with the references; the first that exists is taken. Empty as in
            `BenchmarkFiles`.
        read: gives the questions.
    """

    split: str
    questions: str
    images: tuple[str, ...]
    read: Callable[[BenchmarkFiles], Questions]
    annotations: tuple[str, ...] = ()

    def find(self, folder: Path) -> BenchmarkFiles | None:
        """The files below a folder; None if the question file is not there.

        Raises:
            ValueError: if the question file is there, and its images or references are not.
        """
        questions = next(iter(sorted(folder.glob(self.questions))), None)
        if questions is None:
            return None

        def first(names: tuple[str, ...], what: str) -> Path:
            for path in (folder / name for name in names):
                if path.exists():
                    return path
            expected = " or ".join(str(folder / name) for name in names)
            raise ValueError(f"{questions} is there, but {what} are not; put them at {expected} (docs/evaluation.md)")

        annotations = first(self.annotations, "its references") if self.annotations else None
        return BenchmarkFiles(questions, first(self.images, "its images"), annotations)


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """(place, value) for each line of a JSONL file; the value is a RecordError for a line that is no JSON."""
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                where = f"{path.name}, line {number}"
                try:
                    yield where, parse_row(line, where)
                except RecordError as error:
                    yield where, error


def json_entries(path: Path, key: str = "") -> Iterator[tuple[str, Any]]:
    """(place, entry) for each entry of a JSON file's list: of the list under `key`, or of a file that is one list.

    Raises:
        ValueError: for a file that is not JSON, or has no such list.
    """
    number = 0
    for found, entry in read_entries(path):
        if found == key:
            number += 1
            yield f"{path.name}, entry {number}", entry
    if not number:
        raise ValueError(f"{path} has no list {key!r} with entries; fetch it again" if key else f"{path} is no list")


def questions_of(rows: Iterator[tuple[str, Any]], read: Callable[[str, Any], BenchQuestion]) -> Questions:
    """The question of each row, or the error that reading it gave."""

    def read_one(where: str, row: Any) -> BenchQuestion | RecordError:
        try:
            return row if isinstance(row, RecordError) else read(where, row)
        except RecordError as error:
            return error

    return starmap(read_one, rows)


def value(row: Any, key: str, where: str) -> Any:
    """What a row has under a key. Raises RecordError if it has nothing there, or is no object."""
    if not isinstance(row, Mapping):
        raise RecordError(where, f"the row is a {type(row).__name__}; an object with {key!r} is due")
    if row.get(key) is None:
        raise RecordError(where, f"{key!r} is missing; fetch the file again")
    return row[key]


def text(row: Any, key: str, where: str) -> str:
    """A text or a number, as text. Raises RecordError for anything else."""
    return _as_text(value(row, key, where), key, where)


def texts(row: Any, key: str, where: str) -> tuple[str, ...]:
    """One text, or a list of texts. Raises RecordError for anything else."""
    found = value(row, key, where)
    return tuple(_as_text(entry, key, where) for entry in (found if isinstance(found, list) else [found]))


def _as_text(found: Any, key: str, where: str) -> str:
    if isinstance(found, bool) or not isinstance(found, (str, int, float)):
        raise RecordError(where, f"{key!r} is a {type(found).__name__}; text is due")
    if LONE_SURROGATE.search(str(found)):
        raise RecordError(where, f"{key!r} has half a character (a lone surrogate); write it anew in UTF-8")
    return str(found)
