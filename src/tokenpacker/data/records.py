"""Data files to records, by number, in bounded memory; nothing is decoded.

    JSON      a list of LLaVA rows: read whole once, then only the place of each row in the file is kept.
              Or COCO captions (an object with `images` and `annotations`), of which the text stays in memory.
    JSONL     a LLaVA row in each line; only the places of the lines are kept. Which of the two a file is, its first
              sign says, whatever its name.
    Parquet   the columns of a LLaVA row; one row group at a time is in memory.

`streams` has what can only be read in order: tar shards and the datasets library. `rows` says what a row may hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from abc import ABC, abstractmethod
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


class Records(ABC):
    """Records by number: `records[i]` is a `Record`, or raises `RecordError` where row `i` is bad.

    Args:
        path: the data file.
        images_root: absolute folder that image paths are below.
    """

    def __init__(self, path: Path, images_root: Path) -> None:
        self.files: tuple[Path, ...] = (path,)
        self.images_root = images_root

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def where(self, index: int) -> str:
        """File and place of a row, for messages."""

    @abstractmethod
    def _row(self, index: int) -> Any:
        """A row as it stands in the file. Raises RecordError."""

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} does not exist; there are {len(self)}")
        return read_row(self._row(index), self.images_root, self.where(index))


def open_records(
    data: str | Path | Sequence[str | Path], images_root: str | Path | None = None, *, format: Format | None = None
) -> Records:
    """The records of one file, or of several one after the other.

    Args:
        data: a file, or a list of files; a folder stands for the Parquet files in it.
        images_root: folder that image paths are relative to and may not lead out of; None is each file's own folder.
        format: of all files; None goes by each file's ending.

    Raises:
        ValueError: for a file that is missing, empty, malformed as a whole or of an unknown format, and for a folder
            of images that is missing. A single bad row raises RecordError when it is asked for.
        ImportError: for Parquet without pyarrow.
    """
    paths = check_files(data, images_root, format=format)
    parts = [_open(path, images_root, chosen) for path, chosen in paths]
    return parts[0] if len(parts) == 1 else _Joined(parts)


def check_files(
    data: str | Path | Sequence[str | Path], images_root: str | Path | None = None, *, format: Format | None = None
) -> list[tuple[Path, Format]]:
    """The files that data stand for and their formats; none is opened. Raises ValueError as `open_records`."""
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


def _open(path: Path, images_root: str | Path | None, chosen: Format) -> Records:
    root = Path(os.path.abspath(path.parent if images_root is None else images_root))
    opened = {"json": _open_json, "jsonl": _open_lines, "parquet": _Parquet}[chosen](path, root)
    if not len(opened):
        raise ValueError(f"data file {path} holds no rows; check that it was written to its end")
    return opened


class _Slices(Records):
    """Rows of JSON that lie in the file as they are: only their places are kept, which worker processes share cheaply.

    Args:
        places: (start, end, line) of each row, in bytes and counted from 1.
    """

    def __init__(self, path: Path, images_root: Path, places: Iterable[tuple[int, int, int]]) -> None:
        super().__init__(path, images_root)
        self._places = np.fromiter(places, dtype=np.dtype((np.int64, 3)))

    def __len__(self) -> int:
        return len(self._places)

    def where(self, index: int) -> str:
        return f"{self.files[0]}, line {self._places[index][2]}"

    def _row(self, index: int) -> Any:
        start, end, _ = self._places[index].tolist()
        with self.files[0].open("rb") as file:  # opened anew: worker processes would share a handle's place
            file.seek(start)
            return parse_row(file.read(end - start), self.where(index))


class _Entries(_Slices):
    """Rows of a JSON list, of which many may stand in one line."""

    def where(self, index: int) -> str:
        return f"{self.files[0]}, entry {index + 1} in line {self._places[index][2]}"


class _Captions(Records):
    """COCO captions: a record for each annotation, kept in one block of bytes: no objects to count references of."""

    def __init__(self, path: Path, images_root: Path, rows: Iterable[bytes]) -> None:
        super().__init__(path, images_root)
        block, ends = bytearray(), [0]
        for row in rows:
            block += row
            ends.append(len(block))
        self._block, self._ends = bytes(block), np.array(ends, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def where(self, index: int) -> str:
        return f"{self.files[0]}, annotation {index + 1}"

    def _row(self, index: int) -> Any:
        where = self.where(index)
        row = parse_row(self._block[self._ends[index] : self._ends[index + 1]], where)
        if not isinstance(row["caption"], str) or not row["caption"].strip():
            raise RecordError(where, f"caption={row['caption']!r} is no text; write one", source=where)
        if not isinstance(row["image"], str):
            reason = f"image_id={row['image_id']!r} names no entry of 'images' with a 'file_name'; add it"
            raise RecordError(where, reason, source=where)
        return {"id": row["id"], "image": row["image"], "conversations": caption_messages(row["caption"])}


class _Parquet(Records):
    """Rows of a Parquet file, of which one row group is kept.

    Rows in order are quick; in random order each may cost reading a row group. `streams.open_dataset` reads in order.
    """

    def __init__(self, path: Path, images_root: Path) -> None:
        super().__init__(path, images_root)
        self._file: Any = None
        self._group: tuple[int, Any] = (-1, None)
        metadata = self._open().metadata
        names = self._open().schema_arrow.names
        if "conversations" not in names:
            raise ValueError(f"{path} has no column 'conversations' but {', '.join(names)}; rename the right one")
        self._columns = [name for name in names if name in COLUMNS]
        groups = (metadata.row_group(group).num_rows for group in range(metadata.num_row_groups))
        self._ends = np.array(list(accumulate(groups)), dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None, "_group": (-1, None)}

    def where(self, index: int) -> str:
        return f"{self.files[0]}, row {index + 1}"

    def _open(self) -> Any:
        if self._file is None:
            pyarrow, parquet = _import_pyarrow()
            try:
                self._file = parquet.ParquetFile(self.files[0], memory_map=True)
            except (pyarrow.ArrowException, OSError) as error:
                raise ValueError(f"{self.files[0]} is no readable Parquet file ({error}); write it anew") from None
        return self._file

    def _row(self, index: int) -> Any:
        group = bisect_right(self._ends, index)
        if group != self._group[0]:
            pyarrow, _ = _import_pyarrow()
            self._group = (-1, None)  # the old one goes before the new one comes
            try:
                table = self._open().read_row_group(group, columns=self._columns, use_threads=False)
            except (pyarrow.ArrowException, OSError) as error:
                where = self.where(index)
                raise RecordError(where, f"row group {group + 1} cannot be read: {error}", source=where) from None
            self._group = (group, table)
        first = int(self._ends[group - 1]) if group else 0
        try:
            return self._group[1].slice(index - first, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            where = self.where(index)
            raise RecordError(
                where, f"a text is no UTF-8 at byte {error.start + 1}; write it anew", source=where
            ) from None


class _Joined(Records):
    """Several sources, one after the other."""

    def __init__(self, parts: Sequence[Records]) -> None:
        self.files = tuple(file for part in parts for file in part.files)
        self.images_root = parts[0].images_root
        self._parts = tuple(parts)
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def where(self, index: int) -> str:
        part, place = self._locate(index)
        return part.where(place)

    def __getitem__(self, index: int) -> Record:
        if not 0 <= index < len(self):
            raise IndexError(f"record {index} does not exist; there are {len(self)}")
        part, place = self._locate(index)
        return part[place]

    def _row(self, index: int) -> Any:
        part, place = self._locate(index)
        return part._row(place)

    def _locate(self, index: int) -> tuple[Records, int]:
        number = bisect_right(self._ends, index)
        return self._parts[number], index - (self._ends[number - 1] if number else 0)


def _open_lines(path: Path, images_root: Path) -> Records:
    with path.open("rb") as file:
        start = file.read(1 << 16).removeprefix(BOM.encode()).lstrip()
    if start.startswith(b"["):  # no row begins so
        with contextlib.suppress(ValueError):  # a first line that is a list, before rows
            return _open_json(path, images_root)
    return _Slices(path, images_root, _line_places(path))


def _open_json(path: Path, images_root: Path) -> Records:
    try:
        text = path.read_bytes().decode()  # not as text: rows are found again by their bytes
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text (byte {error.start + 1}); save it as UTF-8") from None
    try:
        start, sign = _after_space(text, len(BOM) if text.startswith(BOM) else 0)
        if sign == "{":
            content, end = json.JSONDecoder().raw_decode(text, start)
            rest, sign = _after_space(text, end)
            if sign and "\n" in text[end:rest]:  # a row in each line
                return _Slices(path, images_root, _line_places(path))
            if sign:
                raise json.JSONDecodeError("Extra data", text, rest)
            if "conversations" in content:  # a single row
                return _Slices(path, images_root, [(0, path.stat().st_size, 1)])
            return _Captions(path, images_root, _caption_rows(path, content))
        return _Entries(path, images_root, _list_places(text, start))
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(f"{path} is no valid JSON at {place}: {error.msg}; repair it there") from None
    except RecursionError:
        raise ValueError(f"{path} nests too many brackets to be data; check the file") from None


def _list_places(text: str, position: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, line) of each entry of the JSON list that begins at `position`, in bytes of its file.

    Each entry is parsed, to find its end, and let go. Raises JSONDecodeError.
    """
    scan = json.JSONDecoder().raw_decode
    if not text.startswith("[", position):
        raise json.JSONDecodeError("a list of rows begins with '['", text, position)
    line, behind, place = 1, 0, 0  # `place` is the byte of the character `behind`
    position, sign = _after_space(text, position + 1)
    while sign != "]":
        _, end = scan(text, position)
        line += text.count("\n", behind, position)
        start = place + len(text[behind:position].encode())
        place = start + len(text[position:end].encode())
        yield start, place, line
        line, behind = line + text.count("\n", position, end), end
        position, sign = _after_space(text, end)
        if sign == ",":
            position, sign = _after_space(text, position + 1)
            if sign == "]":
                raise json.JSONDecodeError("a comma before the end of the list", text, position)
        elif sign != "]":
            raise json.JSONDecodeError("',' or ']' is missing", text, position)
    position, sign = _after_space(text, position + 1)
    if sign:
        raise json.JSONDecodeError("Extra data", text, position)


def _line_places(path: Path) -> Iterator[tuple[int, int, int]]:
    """(start, end, line) of each line that is not blank."""
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield start, start + len(line.rstrip(b"\r\n")), number
            start += len(line)


def _after_space(text: str, position: int) -> tuple[int, str]:
    """Where the next sign stands, and the sign; "" at the end."""
    match = _SPACE.match(text, position)
    assert match is not None  # it matches nothing, too
    return match.end(), text[match.end() : match.end() + 1]


def _caption_rows(path: Path, content: dict[str, Any]) -> Iterator[bytes]:
    """A row for each annotation, its image's file looked up."""
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


def _import_pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError("Parquet needs pyarrow; run: pip install 'tokenpacker[train]'") from None
    return pa, pq
