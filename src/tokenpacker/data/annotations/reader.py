"""Parts that all readers share: the source with its options, regions with answers, and rows made of them."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tokenpacker.data.annotations.region_specs import Size, Spec
from tokenpacker.data.annotations.wording import ask
from tokenpacker.data.labels import GPT, HUMAN
from tokenpacker.data.rows import RecordError
from tokenpacker.hf.processing.llama_tokenizer import IMAGE_TOKEN, REGION_TOKEN
from tokenpacker.images import ImageError, image_size
from tokenpacker.text import check_text

Entry = TypeVar("Entry")
Row = dict[str, Any]
Rows = Iterator[Row | RecordError]
Turn = tuple[str, str]  # question and answer


@dataclass(frozen=True, kw_only=True)
class Source:
    """Annotations of one format.

    Args:
        annotations: the file, or the folder of formats that have one file per image.
        images: folder of the images.
        root: folder that the rows' image paths are relative to.
        max_regions: most regions of a sample.
        seed: decides, with a sample's id, which regions and wordings it gets.
        split: of formats that keep several in one file.
        instances: COCO's annotations that RefCOCO's refs name; None is `instances.json` beside them.

    Raises:
        ValueError: for a missing file or folder, images outside the root, and `max_regions` below 1.
    """

    annotations: Path
    images: Path
    root: Path
    max_regions: int
    seed: int = 0
    split: str = "train"
    instances: Path | None = None

    def __post_init__(self) -> None:
        if self.max_regions < 1:
            raise ValueError(f"max_regions={self.max_regions} must be at least 1")
        for name, folder in (("images", self.images), ("root", self.root)):
            if not folder.is_dir():
                raise ValueError(f"{name}={folder} is no folder; check the path")
        if not Path(os.path.abspath(self.images)).is_relative_to(os.path.abspath(self.root)):
            raise ValueError(
                f"images={self.images} lies outside root={self.root}, which rows start from; choose a root above it"
            )
        if not self.annotations.exists():
            raise ValueError(f"annotations {self.annotations} do not exist; check the path")

    def image(self, id: str, *names: str, size: Size | None = None) -> str:
        """The path relative to `root` of the first of the names that is a file below `images`.

        Args:
            size: of the image in the annotations; None if they do not give it.

        Raises:
            RecordError: if there is no such file, and for an image of another size, whose regions would lie elsewhere.
        """
        path = self.find(id, *names)
        try:
            found = None if size is None else image_size(path)
        except ImageError as error:
            raise RecordError(id, str(error), "unreadable image") from None
        if size is not None and found is not None and found != size:
            turned = "; its EXIF orientation turns it, and the annotations ignore that" if found[::-1] == size else ""
            reason = (
                f"the annotations are of an image of {size[1]}x{size[0]} (width x height), and {path.name} is"
                f" {found[1]}x{found[0]}{turned}; give the images that were annotated"
            )
            raise RecordError(id, reason, "other size")
        return Path(os.path.relpath(path, self.root)).as_posix()

    def find(self, id: str, *names: str) -> Path:
        """The first of the names that is a file below `images`. Raises RecordError if none is."""
        folder = os.path.abspath(self.images)
        for name in names:
            path = Path(os.path.normpath(os.path.join(folder, name)))
            if "\0" not in name and path.is_relative_to(folder) and path.is_file():
                return path
        tried = " or ".join(dict.fromkeys(names)) or "name"
        raise RecordError(id, f"{folder} has no {tried}; check --images, or fetch the images", "missing image")

    def chance(self, id: str) -> random.Random:
        """Random numbers of a sample. They depend on its id and the seed alone."""
        return random.Random(f"regions/{self.seed}/{id}".encode(errors="replace"))

    def chosen(self, entries: Sequence[Entry], chance: random.Random) -> list[Entry]:
        """At most `max_regions` of them, in random order, as the original showed them."""
        return chance.sample(entries, min(len(entries), self.max_regions))


@dataclass(frozen=True)
class Region:
    """A region that can be asked about, and the answer."""

    spec: Spec
    answer: str


def image_rows(
    source: Source,
    id: str,
    names: Sequence[str],
    size: Size | None,
    annotations: Iterable[tuple[str, Entry]],
    read_region: Callable[[str, Entry, Size | None], Region],
    wordings: Sequence[str],
) -> Rows:
    """The row of an image, with a question about each of some regions; none without a usable region.

    A RecordError comes first for each annotation that cannot be used, and takes the row's place if the image cannot.

    Args:
        id: of the row.
        names: that the image may have.
        annotations: of the image, each with an id.
        read_region: gives the region of an id, an annotation and the image's size; it may raise RecordError.
    """
    regions = []
    for name, annotation in annotations:
        try:
            regions.append(read_region(name, annotation, size))
        except RecordError as error:  # noqa: PERF203 - a bad annotation costs no other one
            yield error
    if not regions:
        return
    chance = source.chance(id)
    chosen = source.chosen(regions, chance)
    try:
        path = source.image(id, *names, size=size)
        turns = [(ask(wordings, chance), region.answer) for region in chosen]
        yield make_row(id, path, turns, [region.spec for region in chosen])
    except RecordError as error:
        yield error


def entry_rows(entries: Iterable[tuple[str, Any]], make: Callable[[str, Any], Row]) -> Rows:
    """The row that `make` gives for each id and entry, or the RecordError that it raises."""
    for id, entry in entries:
        try:
            yield make(id, entry)
        except RecordError as error:  # noqa: PERF203 - a bad entry costs no other one
            yield error


def make_row(id: str, image: str, turns: Iterable[Turn], regions: Sequence[Spec]) -> Row:
    """A row of training data; the image stands before the first question.

    Raises:
        RecordError: without turns, for an empty text, and if there are not as many `<mask>` as regions.
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
        RecordError: for anything that is no text, and for a text with a mark in it.
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


def size_of(image: Mapping[str, Any]) -> Size | None:
    """(height, width) of an image, if its entry gives it."""
    height, width = image.get("height"), image.get("width")
    are_numbers = type(height) in (int, float) and type(width) in (int, float)  # 640.0 is 640
    return (height, width) if are_numbers else None  # type: ignore[return-value]


def file_names(image: Mapping[str, Any]) -> tuple[str, ...]:
    """Names that an image's file may have: `COCO_train2014_000000000009.jpg` is `000000000009.jpg` in COCO 2017.

    A folder in front may be missing too.
    """
    name = image.get("file_name")
    if not isinstance(name, str) or not name:
        return ()
    bare = name.rpartition("/")[2]
    return name, bare, bare.rpartition("_")[2]
