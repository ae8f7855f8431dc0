"""A row of a data file to a `Record`: which forms a row may have, and what is wrong with one.

A row is a dict:

    conversations     LLaVA messages
    image or images   a path, the bytes of a file, Parquet's struct of both, a list of these, or nothing
    regions           optional: for each image a list of its regions in the order of their `<mask>`, each
                      `{"box": ...}`, `{"polygon": ...}`, `{"rle": ...}` or `{"mask": path}`
    id                optional: text or a number

Nothing is decoded.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tokenpacker.data.labels import GPT, HUMAN, check_conversation
from tokenpacker.hf.regions.masks import REGION_FORMS
from tokenpacker.images import shown
from tokenpacker.text import LONE_SURROGATE

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
        images: the path or the bytes of each image's file.
        regions: for each image its regions, each a dict with one of the `REGION_FORMS`; empty if no image has any.
        source: file and place in it, for messages.
    """

    id: str
    conversation: tuple[Mapping[str, str], ...]
    images: tuple[ImageReference, ...] = ()
    regions: tuple[tuple[Mapping[str, Any], ...], ...] = ()
    source: str = field(default="", compare=False)


class RecordError(ValueError):
    """A record that cannot be used. The message is one line.

    Args:
        id: of the record, or its file and place if it has none.
        reason: what is wrong, and the remedy.
        kind: under which the reason is counted.
        source: file and place in it.
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
    """The value of a line of JSON. Raises RecordError with the column if it is not JSON."""
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
        images_root: absolute folder; image paths are relative to it.
        where: file and place of the row, for messages and as the id of a row without one.

    Raises:
        RecordError: if the row, its conversation or its regions have another form, or a path leads out of
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
        conversation = _conversation(row.get("conversations"))
    except _BadEntry as error:
        raise RecordError(name, str(error), error.kind, where) from None
    return Record(id=name, conversation=conversation, images=images, regions=regions, source=where)


def caption_messages(caption: str) -> list[dict[str, str]]:
    """A caption as a conversation: the question is the image, the answer the caption."""
    return [{"from": HUMAN, "value": "<image>"}, {"from": GPT, "value": caption.strip()}]


def _printable(text: str) -> str:
    """The text, with an escape for each character that UTF-8 cannot write."""
    return text.encode(errors="backslashreplace").decode()


class _BadEntry(ValueError):
    def __init__(self, reason: str, kind: Kind = "malformed row") -> None:
        super().__init__(reason)
        self.kind: Kind = kind


def _conversation(value: Any) -> tuple[Mapping[str, str], ...]:
    if value is None:
        raise _BadEntry("the row has no 'conversations'; add them", "malformed conversation")
    try:
        messages = check_conversation(value)
    except ValueError as error:
        raise _BadEntry(str(error), "malformed conversation") from None
    return tuple({"from": message["from"], "value": message["value"]} for message in messages)


def _image_entries(row: Mapping[str, Any]) -> list[Any]:
    given = [key for key in ("image", "images") if row.get(key) is not None]
    if len(given) > 1:
        raise _BadEntry("the row has both 'image' and 'images'; leave one out")
    value = row[given[0]] if given else []
    return value if isinstance(value, list) else [value]


def _image(entry: Any, images_root: Path) -> ImageReference:
    """A path below `images_root`, or the bytes of a file. Raises _BadEntry."""
    if isinstance(entry, Mapping):  # Parquet's struct, which the datasets library writes
        entry = entry.get("path") if entry.get("bytes") is None else entry["bytes"]
    if isinstance(entry, bytes):
        return entry
    if not isinstance(entry, str):
        raise _BadEntry(f"an image is a {type(entry).__name__}; give a path, a list of paths, or nothing")
    return _path(entry, images_root, "image")


def _path(entry: str, images_root: Path, what: str) -> str:
    """The path below `images_root`. Raises _BadEntry."""
    if not entry or "\0" in entry or LONE_SURROGATE.search(entry):
        problem = f"{entry!r} names no file; leave the key out where there is no {what}"
    elif ADDRESS.match(entry):
        problem = f"{shown(entry)} is an address, and none is fetched; download it and give its path"
    else:
        # Normalized as text: the file system would follow links before it applies "..".
        path = Path(os.path.normpath(images_root / entry))
        if path.is_relative_to(images_root):
            return str(path)
        problem = f"{entry!r} leads out of {images_root}; write it relative to --images"
    raise _BadEntry(f"{what} path {problem}", "unsafe path")


def _regions(value: Any, num_images: int, images_root: Path) -> tuple[tuple[Mapping[str, Any], ...], ...]:
    """The regions of each image; empty if no image has any. Raises _BadEntry."""
    if isinstance(value, str):  # JSON, for a Parquet column whose regions have several forms
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
    """A region as a dict of its one form. A struct of Parquet has all forms, one of them set. Raises _BadEntry."""
    given = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else {}
    if len(given) != 1 or next(iter(given)) not in REGION_FORMS:
        forms = f"{', '.join(map(repr, given)) or 'nothing'}" if isinstance(entry, Mapping) else type(entry).__name__
        raise _BadEntry(
            f"a region has {forms}; write an object with one of {', '.join(map(repr, REGION_FORMS))}",
            "malformed region",
        )
    if "mask" in given:
        if not isinstance(given["mask"], str):
            raise _BadEntry("the 'mask' of a region must be the path of a PNG file", "malformed region")
        return {"mask": _path(given["mask"], images_root, "mask")}
    return given
