"""Data files as records by number, in bounded memory. Nothing is decoded.

    JSON      a list of LLaVA rows: read whole once, after which only the place of each row in the file is kept.
              Or COCO captions (an object with `images` and `annotations`), whose text stays in memory.
    JSONL     a LLaVA row in each line; only the places of the lines are kept. The first character of a file, not its
              name, tells which of the two it is.
    Parquet   the columns of a LLaVA row; one row group at a time is in memory.

`rows` says what a row may hold. `streams` reads what has an order but no numbers: tar shards and the datasets library.

Tried instead: `load_dataset("json")` of datasets 5.2. One malformed line ends the whole file, without its number; a
streamed list whose `image` is sometimes a string and sometimes a list comes back as JSON text; and it copies the data.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from tokenpacker.data.rows import COLUMNS, Record, RecordError, caption_messages, parse_row, read_row

__all__ = ["Record", "RecordError", "Records", "open_records"]

Format = Literal["json", "jsonl", "parquet"]
SUFFIXES: dict[str, Format] = {".json": "json", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
BOM = "\ufeff"
_SPACE = re.compile(r"[ \t\r\n]*")
_Place = tuple[int, int, int]  # (start, end, line) of a row: bytes, and the line counted from 1


class Records:
    """The rows of data files by number: `records[i]` is a `Record`, or raises `RecordError` if row `i` is bad."""

    def __init__(self, files: Sequence[_File]) -> None:
        self._files = tuple(files)
        self._ends = list(accumulate(len(file) for file in files))
        self.files = tuple(file.path for file in files)
        self.images_root = files[0].images_root

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Record:
        file, number = self._locate(index)
        return read_row(file.row(number), file.images_root, file.where(number))

    def where(self, index: int) -> str:
        """File and place of a row, for messages."""
        file, number = self._locate(index)
        return file.where(number)

    def _locate(self, index: int) -> tuple[_File, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} does not exist; there are {len(self)}")
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)


def open_records(
    data: str | Path | Sequence[str | Path], images_root: str | Path | None = None, *, format: Format | None = None
) -> Records:
    """The records of one file, or of several one after the other.

    Args:
        data: a file, or a list of files; a folder stands for the Parquet files in it.
        images_root: folder that image paths are relative to and may not lead out of; None is each file's own folder.
        format: of all files; None takes each file's ending.

    Raises:
        ValueError: if a file is missing, empty, malformed as a whole or of an unknown format, or the folder of images
            is missing. A single bad row raises RecordError when it is read.
        ImportError: for Parquet without pyarrow.
    """
    files = []
    for path, chosen in check_files(data, images_root, format=format):
        root = Path(os.path.abspath(path.parent if images_root is None else images_root))
        files.append({"json": _open_json, "jsonl": _open_lines, "parquet": _ParquetFile}[chosen](path, root))
        if not len(files[-1]):
            raise ValueError(f"data file {path} holds no rows; check that it was written to its end")
    return Records(files)


def check_files(
    data: str | Path | Sequence[str | Path], images_root: str | Path | None = None, *, format: Format | None = None
) -> list[tuple[Path, Format]]:
    """The files that `data` names, with their formats. Opens none; raises the ValueErrors of `open_records`."""
    if format is not None and format not in get_args(Format):
        raise ValueError(f"format={format!r} is unknown; use one of {', '.join(get_args(Format))}")
    if images_root is not None and not Path(images_root).is_dir():
        raise ValueError(f"images_root={images_root} is no folder; check the path")
    given = [data] if isinstance(data, (str, Path)) else list(data)
    paths = [path for entry in given for path in _files(Path(entry))]
    if not paths:
        raise ValueError("data names no file; give at least one")
    return [(path, format or _format_of(path)) for path in paths]


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"data file {path} does not exist; check the path")
    found = sorted(path.glob("*.parquet"))
    if not found:
        raise ValueError(f"data folder {path} holds no Parquet files; give the data files themselves")
    return found


def _format_of(path: Path) -> Format:
    chosen = SUFFIXES.get(path.suffix.lower())
    if chosen is None:
        endings = ", ".join(SUFFIXES)
        raise ValueError(f"data file {path} ends in none of {endings}; rename it")
    return chosen


class _JsonFile:
    """Rows of JSON, of which only the places are kept.

    Args:
        place: how messages name a row, by its `entry` and `line`.
        content: what the places are in; None is the file.
    """

    def __init__(
        self,
        path: Path,
        images_root: Path,
        places: Iterable[_Place],
        place: str = "entry {entry} in line {line}",
        content: bytes | None = None,
    ) -> None:
        self.path, self.images_root, self._place, self._content = path, images_root, place, content
        self._places = np.fromiter(places, dtype=np.dtype((np.int64, 3)))  # which processes share, unlike objects

    def __len__(self) -> int:
        return len(self._places)

    def where(self, number: int) -> str:
        """File and place of a row, for messages."""
        return f"{self.path}, {self._place.format(entry=number + 1, line=self._places[number][2])}"

    def row(self, number: int) -> Any:
        """The row as it is in the file. Raises RecordError."""
        start, end, _ = self._places[number].tolist()
        if self._content is not None:
            return parse_row(self._content[start:end], self.where(number))
        with self.path.open("rb") as file:  # opened anew: worker processes would share the position of a handle
            file.seek(start)
            return parse_row(file.read(end - start), self.where(number))


class _CaptionFile(_JsonFile):
    """COCO captions, a record for each annotation. Their rows are kept in one block of bytes."""

    def __init__(self, path: Path, images_root: Path, content: dict[str, Any]) -> None:
        rows = list(_caption_rows(path, content))
        ends = list(accumulate(map(len, rows)))
        places = ((end - len(row), end, 0) for row, end in zip(rows, ends, strict=True))
        super().__init__(path, images_root, places, "annotation {entry}", b"".join(rows))

    def row(self, number: int) -> Any:
        """A LLaVA row. Raises RecordError for an annotation without a text or an image."""
        row, where = super().row(number), self.where(number)
        if not isinstance(row["caption"], str) or not row["caption"].strip():
            raise RecordError(where, f"caption={row['caption']!r} is no text; write one", source=where)
        if not isinstance(row["image"], str):
            reason = f"image_id={row['image_id']!r} names no entry of 'images' with a 'file_name'; add it"
            raise RecordError(where, reason, source=where)
        return {"id": row["id"], "image": row["image"], "conversations": caption_messages(row["caption"])}


class _ParquetFile:
    """Rows of a Parquet file, of which one row group is kept.

    Rows in order are fast; in random order each may cost reading a row group. `streams.open_dataset` reads in order.
    """

    def __init__(self, path: Path, images_root: Path) -> None:
        self.path, self.images_root = path, images_root
        self._opened: Any = None
        self._group: tuple[int, Any] = (-1, None)
        metadata, names = self._open().metadata, self._open().schema_arrow.names
        if "conversations" not in names:
            raise ValueError(f"{path} has no column 'conversations' but {', '.join(names)}; rename the right one")
        self._columns = [name for name in names if name in COLUMNS]
        groups = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._ends = np.array(list(accumulate(groups)), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_opened": None, "_group": (-1, None)}

    def where(self, number: int) -> str:
        return f"{self.path}, row {number + 1}"

    def row(self, number: int) -> Any:
        import pyarrow as pa

        group, where = bisect_right(self._ends, number), self.where(number)
        if group != self._group[0]:
            self._group = (-1, None)  # frees the old one before the new one is read
            try:
                table = self._open().read_row_group(group, columns=self._columns, use_threads=False)
            except (pa.ArrowException, OSError) as error:
                raise RecordError(where, f"row group {group + 1} cannot be read: {error}", source=where) from None
            self._group = (group, table)
        first = int(self._ends[group - 1]) if group else 0
        try:
            return self._group[1].slice(number - first, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            reason = f"a text is no UTF-8 at byte {error.start + 1}; write it anew"
            raise RecordError(where, reason, source=where) from None

    def _open(self) -> Any:
        if self._opened is None:
            try:
                import pyarrow as pa
                import pyarrow.parquet as pq
            except ImportError:
                raise ImportError("Parquet needs pyarrow; run: pip install 'tokenpacker[train]'") from None
            try:
                self._opened = pq.ParquetFile(self.path, memory_map=True)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{self.path} is no readable Parquet file ({error}); write it anew") from None
        return self._opened


_File = _JsonFile | _ParquetFile


def _open_lines(path: Path, images_root: Path) -> _File:
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(BOM.encode()).lstrip()
    if start.startswith(b"["):  # a list of rows
        with contextlib.suppress(ValueError):  # or a bad first line, with rows behind it
            return _open_json(path, images_root)
    return _JsonFile(path, images_root, _line_places(path), "line {line}")


def _open_json(path: Path, images_root: Path) -> _File:
    try:
        text = path.read_bytes().decode()  # not read as text: rows are found again by their bytes
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None
    try:
        start, char = _after_space(text, len(BOM) if text.startswith(BOM) else 0)
        if char == "{":
            content, end = json.JSONDecoder().raw_decode(text, start)
            rest, char = _after_space(text, end)
            if char and "\n" in text[end:rest]:  # a row in each line
                return _JsonFile(path, images_root, _line_places(path), "line {line}")
            if char:
                raise json.JSONDecodeError("Extra data", text, rest)
            if "conversations" in content:  # a single row
                return _JsonFile(path, images_root, [(0, path.stat().st_size, 1)], "line {line}")
            return _CaptionFile(path, images_root, content)
        return _JsonFile(path, images_root, _list_places(text, start))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is no valid JSON at {place}: {error.msg}; repair it there") from None
    except RecursionError:
        raise ValueError(f"{path} nests too many brackets to be data; check the file") from None


def _list_places(text: str, position: int) -> Iterator[_Place]:
    """The place of each entry of the JSON list that begins at `position`.

    Each entry is parsed only to find its end. Raises JSONDecodeError.
    """
    scan = json.JSONDecoder().raw_decode
    if not text.startswith("[", position):
        raise json.JSONDecodeError("a list of rows begins with '['", text, position)
    line, behind, place = 1, 0, 0  # `place` is the byte of the character `behind`
    position, char = _after_space(text, position + 1)
    while char != "]":
        _, end = scan(text, position)
        line += text.count("\n", behind, position)
        start = place + len(text[behind:position].encode())
        place = start + len(text[position:end].encode())
        yield start, place, line
        line, behind = line + text.count("\n", position, end), end
        position, char = _after_space(text, end)
        if char == ",":
            position, char = _after_space(text, position + 1)
            if char == "]":
                raise json.JSONDecodeError("a comma before the end of the list", text, position)
        elif char != "]":
            raise json.JSONDecodeError("',' or ']' is missing", text, position)
    position, char = _after_space(text, position + 1)
    if char:
        raise json.JSONDecodeError("Extra data", text, position)


def _line_places(path: Path) -> Iterator[_Place]:
    """The place of each line that is not blank."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield start, start + len(line.rstrip(b"\r\n")), number
            start += len(line)


def _after_space(text: str, position: int) -> tuple[int, str]:
    """The position of the next character that is no space, and the character; "" at the end."""
    match = _SPACE.match(text, position)
    assert match is not None  # the empty text matches too
    return match.end(), text[match.end() : match.end() + 1]


def _caption_rows(path: Path, content: dict[str, Any]) -> Iterator[bytes]:
    """A row for each annotation, with the file of its image."""
    lists = [content.get(key) for key in ("images", "annotations")]
    if not all(isinstance(entries, list) for entries in lists):
        raise ValueError(
            f"{path} is an object without the lists 'images' and 'annotations' of COCO captions; write"
            " a list of LLaVA rows"
        )
    images, annotations = ([entry if isinstance(entry, dict) else {} for entry in entries or []] for entries in lists)
    names = {str(image.get("id")): image.get("file_name") for image in images}
    for annotation in annotations:
        image_id = annotation.get("image_id")
        row = {"id": annotation.get("id"), "image_id": image_id, "image": names.get(str(image_id))}
        yield json.dumps({**row, "caption": annotation.get("caption")}).encode()
