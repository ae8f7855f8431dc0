"""What every reader is given: where annotations and images lie, how many regions a sample takes, and what chance is."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenpacker.data.labels import GPT, HUMAN
from tokenpacker.data.rows import RecordError
from tokenpacker.hf.processing.llama_tokenizer import IMAGE_TOKEN, REGION_TOKEN
from tokenpacker.images import ImageError, image_size
from tokenpacker.text import check_text

Entry = TypeVar("Entry")
Row = dict[str, Any]
Rows = Iterator[Row | RecordError]
Turn = tuple[str, str]  # question and answer
Size = tuple[int, int]  # (height, width)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Annotations of one format.

    Args:
        annotations: the file, or the folder of formats that have one file per image.
        images: folder of the images.
        root: folder that the rows' image paths are relative to.
        max_regions: most regions of a sample.
        seed: chooses regions and wording, for each sample by its id.
        split: of formats that keep several in one file.
        instances: COCO's annotations that RefCOCO's refer to; None is `instances.json` beside them.
    """

    annotations: Path
    images: Path
    root: Path
    max_regions: int
    seed: int = 0
    split: str = "train"
    instances: Path | None = None

    def image(self, id: str, *names: str, size: Size | None = None) -> str:
        """The path below `root` of the first of the names that is a file below `images`.

        Args:
            size: that the annotations give the image; None where they give none.

        Raises:
            RecordError: as `find`, and for an image of another size: its regions would lie elsewhere.
        """
        path = self.find(id, *names)
        if size is not None:
            _require_size(id, path, size)
        return Path(os.path.relpath(path, self.root)).as_posix()

    def find(self, id: str, *names: str) -> Path:
        """The first of the names that is a file below `images`.

        Raises:
            RecordError: when none is.
        """
        folder = os.path.normpath(self.images)
        for name in names:
            path = Path(os.path.normpath(self.images / name))
            if "\0" not in name and path.is_relative_to(folder) and path.is_file():
                return path
        tried = " or ".join(dict.fromkeys(names)) or "name"
        raise RecordError(id, f"{self.images} has no {tried}; check --images, or fetch the images", "missing image")

    def chance(self, id: str) -> random.Random:
        """The same for the same sample and seed, whatever else is read."""
        return random.Random(f"regions/{self.seed}/{id}".encode(errors="replace"))

    def chosen(self, entries: Sequence[Entry], chance: random.Random) -> list[Entry]:
        """At most `max_regions` of them, in random order, as the original showed them."""
        return chance.sample(entries, min(len(entries), self.max_regions))


def _require_size(id: str, path: Path, size: Size) -> None:
    try:
        found = image_size(path)
    except ImageError as error:
        raise RecordError(id, str(error), "unreadable image") from None
    if found != size:
        turned = "; its EXIF orientation turns it, and the annotations ignore that" if found[::-1] == size else ""
        raise RecordError(
            id,
            f"the annotations are of an image of {size[1]}x{size[0]} (width x height), and {path.name} is"
            f" {found[1]}x{found[0]}{turned}; give the images that were annotated",
            "other size",
        )


def make_row(id: str, image: str, turns: Iterable[Turn], regions: Sequence[Any]) -> Row:
    """A row of training data; the image stands before the first question.

    Raises:
        RecordError: without turns, for a text that is empty, and for another number of `<mask>` than of regions.
    """
    messages = []
    for question, answer in turns:
        if not question.strip() or not answer.strip():
            raise RecordError(id, "a question or an answer is empty; write one", "malformed conversation")
        messages += [{"from": HUMAN, "value": question.strip()}, {"from": GPT, "value": answer.strip()}]
    if not messages:
        raise RecordError(id, "there is nothing to ask about", "nothing to learn")
    if any(IMAGE_TOKEN in message["value"] for message in messages):
        raise RecordError(id, f"a text holds {IMAGE_TOKEN}, which marks images; take it out", "malformed conversation")
    num_marks = sum(message["value"].count(REGION_TOKEN) for message in messages)
    if num_marks != len(regions):
        reason = f"the texts have {num_marks} {REGION_TOKEN} for {len(regions)} regions; write one for each"
        raise RecordError(id, reason, "regions and marks differ")
    messages[0]["value"] = f"{IMAGE_TOKEN}\n{messages[0]['value']}"
    return {"id": id, "image": image, "conversations": messages, "regions": [list(regions)]}


def plain_text(id: str, value: Any, what: str) -> str:
    """A text of the annotations that goes into a row.

    Raises:
        RecordError: for anything that is no text, and for one with a mark in it.
    """
    if not isinstance(value, str) or not value.strip():
        raise RecordError(id, f"{what}={value!r} is no text", "malformed row")
    try:
        check_text(value, what)
    except ValueError as error:
        raise RecordError(id, str(error)) from None
    for mark in (IMAGE_TOKEN, REGION_TOKEN):
        if mark in value:
            raise RecordError(id, f"{what} holds {mark}, which marks images and regions", "malformed row")
    return " ".join(value.split())
