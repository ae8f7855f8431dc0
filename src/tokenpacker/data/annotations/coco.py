"""COCO's instances, and what is written in its form: a file with `images`, `annotations` and `categories`.

Source: the format that cocodataset.org describes under "Object Detection". An annotation has `image_id`, `category_id`,
a `segmentation` (polygons, or an RLE where `iscrowd` is 1) and a `bbox` [x, y, width, height].
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tokenpacker.data.annotations import wording
from tokenpacker.data.annotations.entries import read_entries
from tokenpacker.data.annotations.reader import Row, Rows, Size, Source, Turn, make_row, plain_text
from tokenpacker.data.annotations.region_specs import Spec, segmentation_spec
from tokenpacker.data.rows import RecordError

KEPT = ("id", "category_id", "segmentation", "bbox", "caption", "ignore")  # of an annotation
Annotation = dict[str, Any]


@dataclass
class CocoFile:
    """What such a file holds; annotations stay text, not objects, until their image's turn comes.

    Args:
        images: by id.
        categories: by id.
        annotations: by the id of their image.
    """

    images: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    categories: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    annotations: dict[str, list[bytes]] = field(default_factory=dict)

    @classmethod
    def read(cls, source: Source) -> CocoFile:
        """The file that a source names. Raises ValueError for one of another form."""
        content = cls()
        for key, entry in read_entries(source.annotations):
            if key in ("images", "categories", "annotations") and not isinstance(entry, Mapping):
                raise ValueError(f"{source.annotations}: an entry of {key!r} is a {type(entry).__name__}, no object")
            if key == "annotations":
                kept = {name: entry[name] for name in KEPT if name in entry}
                line = json.dumps(kept, separators=(",", ":")).encode()
                content.annotations.setdefault(identity(entry.get("image_id")), []).append(line)
            elif key in ("images", "categories"):
                getattr(content, key)[identity(entry.get("id"))] = entry
        if not content.images or not content.annotations:
            missing = "images" if not content.images else "annotations"
            raise ValueError(f"{source.annotations} has no list {missing!r} with entries; give a file in COCO's form")
        return content

    def image_annotations(self, image_id: str) -> list[Annotation]:
        """The annotations of an image, in the file's order, without those to be ignored."""
        found = (json.loads(line) for line in self.annotations.get(image_id, ()))
        return [annotation for annotation in found if not annotation.get("ignore")]

    def category(self, id: str, annotation: Annotation) -> str:
        """The name of an annotation's category. Raises RecordError for one that the file does not list."""
        category = self.categories.get(identity(annotation.get("category_id")))
        if category is None:
            raise RecordError(id, f"category_id={annotation.get('category_id')!r} is not listed in 'categories'")
        return plain_text(id, category.get("name"), "the category's name")


@dataclass(frozen=True)
class Region:
    """A region that can be asked about, and the answer."""

    spec: Spec
    answer: str


Ask = Callable[[Sequence[Region], random.Random], list[Turn]]  # the turns about regions, in their order


def read_instances(source: Source) -> Rows:
    """A row for each image: regions chosen by chance are named in turn."""
    content = CocoFile.read(source)
    yield from rows_of_images(source, content, content.category, one_by_one(wording.NAME, wording.NAME_FORM))


def one_by_one(wordings: Sequence[str], form: str) -> Ask:
    """A question about each region in turn."""

    def ask(regions: Sequence[Region], chance: random.Random) -> list[Turn]:
        return [(wording.ask(wordings, chance, form), region.answer) for region in regions]

    return ask


def rows_of_images(source: Source, content: CocoFile, answer: Callable[[str, Annotation], str], ask: Ask) -> Rows:
    """A row for each image with annotations; a RecordError for each annotation and image that cannot be used.

    Args:
        answer: the answer for an annotation; it may raise RecordError.
        ask: the turns about the chosen regions, in their order.
    """
    for image_id, image in content.images.items():
        id = f"image {image_id}"
        regions, problems = sorted_out(
            attempt(region_of, f"{id}, annotation {annotation.get('id')}", annotation, size_of(image), answer)
            for annotation in content.image_annotations(image_id)
        )
        yield from problems
        if regions:
            yield row_of_regions(source, id, image, regions, ask)
    yield from _without_image(content)


def region_of(id: str, annotation: Annotation, size: Size | None, answer: Callable[[str, Annotation], str]) -> Region:
    """The region of an annotation with its answer. Raises RecordError."""
    return Region(segmentation_spec(id, annotation, size), answer(id, annotation))


def attempt(make: Callable[..., Region], *arguments: Any) -> Region | RecordError:
    """What the call gives, or the RecordError that it raises."""
    try:
        return make(*arguments)
    except RecordError as error:
        return error


def sorted_out(results: Iterable[Region | RecordError]) -> tuple[list[Region], list[RecordError]]:
    """The regions, and the errors."""
    regions, problems = [], []
    for result in results:
        if isinstance(result, Region):
            regions.append(result)
        else:
            problems.append(result)
    return regions, problems


def row_of_regions(
    source: Source, id: str, image: Mapping[str, Any], regions: Sequence[Region], ask: Ask
) -> Row | RecordError:
    """The row that asks about some of the regions of an image."""
    chance = source.chance(id)
    chosen = source.chosen(regions, chance)
    try:
        path = source.image(id, *file_names(image.get("file_name")), size=size_of(image))
        return make_row(id, path, ask(chosen, chance), [region.spec for region in chosen])
    except RecordError as error:
        return error


def identity(id: Any) -> str:
    """An id as the key of a table, whatever a file may have in its place; 7 and "7" are the same."""
    return str(id)


def size_of(image: Mapping[str, Any]) -> Size | None:
    """(height, width) of an image, where the file says it."""
    height, width = image.get("height"), image.get("width")
    are_numbers = type(height) in (int, float) and type(width) in (int, float)  # 640.0 is 640
    return (height, width) if are_numbers else None  # type: ignore[return-value]


def file_names(name: Any) -> tuple[str, ...]:
    """Names that an image may have on disk: COCO 2014's `COCO_train2014_000000000009.jpg` is 2017's `000000000009.jpg`.

    A folder in front may be missing too.
    """
    if not isinstance(name, str) or not name:
        return ()
    bare = name.rpartition("/")[2]
    return name, bare, bare.rpartition("_")[2]


def _without_image(content: CocoFile) -> Iterator[RecordError]:
    for image_id in content.annotations:
        if image_id not in content.images:
            reason = f"annotations name image_id={image_id}, which is not listed in 'images'"
            yield RecordError(f"image {image_id}", reason)
