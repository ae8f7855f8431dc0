"""Reads MATLAB's files of level 5, as far as PascalPart needs them: structs, texts and matrices of numbers.

    struct array         a list of dicts
    text                 str
    numbers, logicals    a NumPy array (rows, cols)

Source: MathWorks, "MAT-File Format", the chapters on version 5. `scipy.io.loadmat` reads these files too, but scipy
takes 140 MB on disk, which is much for one data set.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

HEADER = 128  # bytes
MATRIX, COMPRESSED = 14, 15
# Numbers of element types, and of array kinds.
TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8", 16: "u1", 17: "u2"}
STRUCT, TEXT, NUMERIC = 2, 4, range(6, 16)
UTF_8, UTF_16 = (16,), (4, 17)  # element types of texts; others hold Latin-1
LARGEST = 1 << 28  # bytes that a file may unpack to


class MatlabError(ValueError):
    """A file that is damaged, or holds something else."""


def read_matlab(path: Path) -> dict[str, Any]:
    """The variables of a file by name.

    Raises:
        MatlabError: for a file that is damaged, of another version, or holds other kinds of arrays.
    """
    try:
        data = path.read_bytes()
        if len(data) < HEADER or data[126:128] not in (b"IM", b"MI"):
            raise MatlabError("it is no MAT-file of level 5; save it with -v7 or older")
        order = "<" if data[126:128] == b"IM" else ">"
        return dict(_variables(memoryview(data)[HEADER:], order))
    except MatlabError:
        raise
    except (struct.error, zlib.error, IndexError, ValueError, RecursionError, OSError) as error:
        raise MatlabError(f"it is damaged ({error}); fetch it again") from None


def _variables(data: memoryview, order: str) -> Iterator[tuple[str, Any]]:
    while data:
        kind, body, data = _element(data, order, padded=False)
        if kind == COMPRESSED:
            unpacked = zlib.decompressobj().decompress(body, LARGEST)
            kind, body, _ = _element(memoryview(unpacked), order)
        if kind == MATRIX:
            yield _array(body, order)


def _element(data: memoryview, order: str, padded: bool = True) -> tuple[int, memoryview, memoryview]:
    """Type and body of the first element, and what follows it."""
    kind, size = struct.unpack_from(f"{order}II", data)
    if kind >> 16:  # a small element: size and body within eight bytes
        kind, size = kind & 0xFFFF, kind >> 16
        return kind, data[4 : 4 + size], data[8:]
    if size > len(data) - 8:
        raise MatlabError("it is cut off; fetch it again")
    end = 8 + size
    return kind, data[8:end], data[end + (-size % 8 if padded else 0) :]


def _array(body: memoryview, order: str) -> tuple[str, Any]:
    """Name and value of an array."""
    if not body:
        return "", []
    _, flags, body = _element(body, order)
    kind = struct.unpack_from(f"{order}I", flags)[0] & 0xFF
    _, dimensions, body = _element(body, order)
    shape = np.frombuffer(dimensions, f"{order}i4").tolist()
    _, name, body = _element(body, order)
    if kind == STRUCT:
        return str(name, "latin-1"), _structs(body, order, shape)
    if kind != TEXT and kind not in NUMERIC:
        raise MatlabError(f"it holds an array of kind {kind}; only structs, texts and numbers are read")
    element_type, values, _ = _element(body, order)
    if kind == TEXT:
        utf_16 = "utf-16-le" if order == "<" else "utf-16-be"
        encoding = utf_16 if element_type in UTF_16 else "utf-8" if element_type in UTF_8 else "latin-1"
        return str(name, "latin-1"), str(values, encoding)
    if element_type not in TYPES:
        raise MatlabError(f"it holds numbers of type {element_type}, which does not exist; fetch it again")
    flat = np.frombuffer(values, np.dtype(f"{order}{TYPES[element_type]}"))
    if flat.size != int(np.prod(shape)):
        raise MatlabError("a matrix is cut off; fetch it again")
    return str(name, "latin-1"), flat.reshape(shape, order="F")


def _structs(body: memoryview, order: str, shape: list[int]) -> list[dict[str, Any]]:
    _, width, body = _element(body, order)
    (length,) = struct.unpack_from(f"{order}i", width)
    if length < 1:
        raise MatlabError(f"a struct has field names of {length} bytes; fetch it again")
    _, names, body = _element(body, order)
    fields = [str(names[at : at + length], "latin-1").split("\0")[0] for at in range(0, len(names), length)]
    structs = []
    for _ in range(int(np.prod(shape)) if fields else 0):
        values = {}
        for field in fields:
            _, value, body = _element(body, order)
            values[field] = _array(value, order)[1]
        structs.append(values)
    return structs
