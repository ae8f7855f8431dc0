"""Rows of data files to records: the one place that says what a row may look like, and what is wrong with one.

A row is a dict with `conversations` (LLaVA messages), `image` or `images` (a path, the bytes of a file, Parquet's
struct of both, a list of such, or nothing) and, if it likes, `id`. Nothing is decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenpacker.train.labels import GPT, HUMAN, check_conversation

Kind = Literal[
    "malformed row",
    "malformed conversation",
    "unsafe path",
    "missing image",
    "unreadable image",
    "images and marks differ",
    "nothing to learn",
    "too long",
    "damaged shard",
]
ImageReference = str | bytes
COLUMNS = ("id", "image", "images", "conversations")
ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://|data:", re.IGNORECASE)
LONGEST_REASON = 400  # characters; a reason may quote a whole conversation


@dataclass(frozen=True, kw_only=True)
class Record:
    """One conversation and its images, nothing decoded.

    Args:
        conversation: LLaVA messages, `{"from": "human" | "gpt", "value": text}`.
        images: for each image its file's path or the bytes of the file.
        source: file and place in it, for messages.
    """

    id: str
    conversation: tuple[Mapping[str, str], ...]
    images: tuple[ImageReference, ...] = ()
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
        reason = " ".join(reason.split())
        self.id = id
        self.reason = reason if len(reason) <= LONGEST_REASON else f"{reason[: LONGEST_REASON - 3]}..."
        self.kind: Kind = kind
        self.source = source
        super().__init__(f"{' '.join(id.split())}: {self.reason}")

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
        RecordError: for a row or a conversation of another form, and for a path that leads out of `images_root`.
    """
    if not isinstance(row, Mapping):
        raise RecordError(
            where, f"the row is a {type(row).__name__}; write an object with 'conversations'", source=where
        )
    id = row.get("id")
    if isinstance(id, bool) or not isinstance(id, (str, int, type(None))):
        raise RecordError(where, f"id={id!r} is a {type(id).__name__}; write text or a number", source=where)
    name = where if id in (None, "") else str(id)
    try:
        images = tuple(_image(entry, images_root) for entry in _image_entries(row))
    except _BadImage as error:
        raise RecordError(name, str(error), error.kind, where) from None
    if row.get("conversations") is None:
        raise RecordError(name, "the row has no 'conversations'; add them", "malformed conversation", where)
    try:
        messages = check_conversation(row["conversations"])
    except ValueError as error:
        raise RecordError(name, str(error), "malformed conversation", where) from None
    conversation = tuple({"from": message["from"], "value": message["value"]} for message in messages)
    return Record(id=name, conversation=conversation, images=images, source=where)


def caption_messages(caption: str) -> list[dict[str, str]]:
    """An image's caption as a conversation: the image is shown, the caption is the answer."""
    return [{"from": HUMAN, "value": "<image>"}, {"from": GPT, "value": caption.strip()}]


class _BadImage(ValueError):
    def __init__(self, reason: str, kind: Kind = "malformed row") -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def _image_entries(row: Mapping[str, Any]) -> list[Any]:
    given = [key for key in ("image", "images") if row.get(key) is not None]
    if len(given) > 1:
        raise _BadImage("the row has both 'image' and 'images'; leave one out")
    value = row[given[0]] if given else []
    return value if isinstance(value, list) else [value]


def _image(entry: Any, images_root: Path) -> ImageReference:
    """A path below the root, or bytes. Raises _BadImage."""
    if isinstance(entry, Mapping):  # Parquet's struct, as the datasets library writes it
        entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str):
        raise _BadImage(f"an image is a {type(entry).__name__}; give a path, a list of paths, or nothing")
    if not entry or "\0" in entry:
        raise _BadImage(f"image path {entry!r} names no file; leave the key out where there is no image", "unsafe path")
    if ADDRESS.match(entry):
        shown = entry if len(entry) <= 80 else f"{entry[:77]}..."
        raise _BadImage(
            f"image {shown} is an address, and none is fetched; download it and give its path", "unsafe path"
        )
    # Taking ".." out by the text alone leaves none for the file system, which would follow links before it.
    path = Path(os.path.normpath(images_root / entry))
    if not path.is_relative_to(images_root):
        raise _BadImage(
            f"image path {entry!r} leads out of {images_root}; write it relative to --images", "unsafe path"
        )
    return str(path)
