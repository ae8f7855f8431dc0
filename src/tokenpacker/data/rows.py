"""Rows of data files to records: the one place that says what a row may look like, and what is wrong with one.

A row is a dict with `conversations` (LLaVA messages), `image` or `images` (a path, the bytes of a file, Parquet's
struct of both, a list of such, or nothing) and, if it likes, `id` and `regions`: for each image a list of its regions
in the order of their `<mask>`, each `{"box": ...}`, `{"polygon": ...}`, `{"rle": ...}` or `{"mask": path}`. Nothing is
decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenpacker.data.labels import GPT, HUMAN, check_conversation, is_encodable
from tokenpacker.hf.regions.masks import REGION_FORMS

Kind = Literal[
    "malformed row",
    "malformed conversation",
    "unsafe path",
    "missing image",
    "unreadable image",
    "images and marks differ",
    "malformed region",
    "regions and marks differ",
    "too many regions",
    "other size",
    "nothing to learn",
    "too long",
    "damaged shard",
]
ImageReference = str | bytes
COLUMNS = ("id", "image", "images", "conversations", "regions")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
LONGEST_REASON = 400  # characters; a reason may quote a whole conversation


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation and its images, nothing decoded.

    Args:
        conversation: LLaVA messages, `{"from": "human" | "gpt", "value": text}`.
        images: for each image its file's path or the bytes of the file.
        regions: for each image its regions, each a dict of one of the `REGION_FORMS`; empty where no image has any.
        source: file and place in it, for messages.
    """

    id: str
    conversation: tuple[Mapping[str, str], ...]
    images: tuple[ImageReference, ...] = ()
    regions: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    source: str = field(default="", compare=False)


class RecordError(ValueError):
    """One sample that cannot be used; the message is one line.

    Args:
        id: the record's own id, or its place where it has none.
        reason: what is wrong, and the remedy.
        kind: what such reasons are counted under.
        source: file and place in it, where known.
    """

    def __init__(self, id: str, reason: str, kind: Kind = "malformed row", source: str = "") -> None:
        reason = " ".join(_printable(reason).split())
        self.id = _printable(id)
        self.reason = reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 3]}..."
        self.kind: Kind = kind
        self.source = source
        super().__init__(f"{' '.join(self.id.split())}: {self.reason}")

    def __reduce__(self) -> tuple[Any, ...]:
        return RecordError, (self.id, self.reason, self.kind, self.source)  # between worker processes


def parse_row(line: bytes, where: str) -> Any:
    """What a line of JSON holds. Raises RecordError, with the column, for anything else."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise RecordError(where, f"no valid JSON at column {error.pos + 1}: {error.msg}", source=where) from None
    except UnicodeDecodeError as error:
        raise RecordError(where, f"no UTF-8 at byte {error.start + 1}; save it as UTF-8", source=where) from None
    except (ValueError, RecursionError) as error:  # integers of thousands of digits, thousands of brackets
        raise RecordError(where, f"no usable JSON: {error}", source=where) from None


def read_row(row: Any, images_root: Path, where: str) -> Record:
    """The record of a row.

    Args:
        images_root: absolute; image paths are below it.
        where: the row's file and place, for messages; the id of a row that has none.

    Raises:
        RecordError: for a row, a conversation or regions of another form, and for a path that leads out of
            `images_root`.
    """
    if not isinstance(row, Mapping):
        raise RecordError(
            where, f"the row is a {type(row).__name__}; write an object with 'conversations'", source=where
        )
    id = row.get("id")
    if isinstance(id, bool) or not isinstance(id, (str, int, type(None))):
        raise RecordError(where, f"id={id!r} is a {type(id).__name__}; write text or a number", source=where)
    name = where if id in (None, "") else _printable(str(id))
    try:
        images = tuple(_image(entry, images_root) for entry in _image_entries(row))
        regions = _regions(row.get("regions"), len(images), images_root)
    except _BadEntry as error:
        raise RecordError(name, str(error), error.kind, where) from None
    if row.get("conversations") is None:
        raise RecordError(name, "the row has no 'conversations'; add them", "malformed conversation", where)
    try:
        messages = check_conversation(row["conversations"])
    except ValueError as error:
        raise RecordError(name, str(error), "malformed conversation", where) from None
    conversation = tuple({"from": message["from"], "value": message["value"]} for message in messages)
    return Record(id=name, conversation=conversation, images=images, regions=regions, source=where)


def _printable(text: str) -> str:
    """The text, with what cannot be written as UTF-8 as an escape."""
    return text.encode(errors="backslashreplace").decode()


def caption_messages(caption: str) -> list[dict[str, str]]:
    """An image's caption as a conversation: the image is shown, the caption is the answer."""
    return [{"from": HUMAN, "value": "<image>"}, {"from": GPT, "value": caption.strip()}]


class _BadEntry(ValueError):
    def __init__(self, reason: str, kind: Kind = "malformed row") -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def _image_entries(row: Mapping[str, Any]) -> list[Any]:
    given = [key for key in ("image", "images") if row.get(key) is not None]
    if len(given) > 1:
        raise _BadEntry("the row has both 'image' and 'images'; leave one out")
    value = row[given[0]] if given else []
    return value if isinstance(value, list) else [value]


def _image(entry: Any, images_root: Path) -> ImageReference:
    """A path below the root, or bytes. Raises _BadEntry."""
    if isinstance(entry, Mapping):  # Parquet's struct, as the datasets library writes it
        entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str):
        raise _BadEntry(f"an image is a {type(entry).__name__}; give a path, a list of paths, or nothing")
    return _path(entry, images_root, "image")


def _path(entry: str, images_root: Path, what: str) -> str:
    """The path below the root. Raises _BadEntry."""
    if not entry or "\0" in entry or not is_encodable(entry):
        raise _BadEntry(
            f"{what} path {entry!r} names no file; leave the key out where there is no {what}", "unsafe path"
        )
    if ADDRESS.match(entry):
        shown = entry if len(entry) <= 80 else f"{entry[:77]}..."
        raise _BadEntry(
            f"{what} {shown} is an address, and none is fetched; download it and give its path", "unsafe path"
        )
    # Taking ".." out by the text alone leaves none for the file system, which would follow links before it.
    path = Path(os.path.normpath(images_root / entry))
    if not path.is_relative_to(images_root):
        raise _BadEntry(
            f"{what} path {entry!r} leads out of {images_root}; write it relative to --images", "unsafe path"
        )
    return str(path)


def _regions(value: Any, num_images: int, images_root: Path) -> tuple[tuple[Mapping[str, Any], ...], ...]:
    """The regions of each image; nothing where no image has any. Raises _BadEntry."""
    if isinstance(value, str):  # a column of Parquet whose regions are of several forms
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise _BadEntry(f"'regions' is a text and no JSON: {error}", "malformed region") from None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(entries, (list, type(None))) for entries in value):
        raise _BadEntry("'regions' must be a list with a list of regions for each image", "malformed region")
    if any(value) and len(value) != num_images:
        raise _BadEntry(
            f"'regions' has lists for {len(value)} images, and the row has {num_images} images; write one list for"
            " each, empty where an image has none",
            "malformed region",
        )
    found = tuple(tuple(_region(entry, images_root) for entry in entries or ()) for entries in value)
    return found if any(found) else ()


def _region(entry: Any, images_root: Path) -> Mapping[str, Any]:
    """A region by its form; Parquet's structs have all forms, all but one empty. Raises _BadEntry."""
    given = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else {}
    if len(given) != 1 or next(iter(given)) not in REGION_FORMS:
        shown = f"{', '.join(map(repr, given)) or 'nothing'}" if isinstance(entry, Mapping) else type(entry).__name__
        raise _BadEntry(
            f"a region has {shown}; write an object with one of {', '.join(map(repr, REGION_FORMS))}",
            "malformed region",
        )
    if "mask" in given:
        if not isinstance(given["mask"], str):
            raise _BadEntry("the 'mask' of a region must be the path of a PNG file", "malformed region")
        return {"mask": _path(given["mask"], images_root, "mask")}
    return given
