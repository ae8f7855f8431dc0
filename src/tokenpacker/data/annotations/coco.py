"""COCO's instances, and other data sets in its form: a file with `images`, `annotations` and `categories`.

Source: the format that cocodataset.org describes under "Object Detection". An annotation has `image_id`, `category_id`,
a `segmentation` (polygons, or an RLE if `iscrowd` is 1) and a `bbox` [x, y, width, height].
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations.entries import read_entries
from tokenpacker.data.annotations.reader import Region, Rows, Source, file_names, image_rows, plain_text, size_of
from tokenpacker.data.annotations.region_specs import Size, segmentation_spec
from tokenpacker.data.annotations.wording import NAME
from tokenpacker.data.rows import RecordError

KEPT = ("id", "category_id", "segmentation", "bbox", "caption", "ignore")  # of an annotation
Annotation = dict[str, Any]


@dataclass
class CocoFile:
    """The content of such a file. Annotations stay text, which takes less memory, until their image's turn comes.

    Args:
        images: by id.
        categories: by id.
        annotations: by the id of their image.
    """

    images: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    categories: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    annotations: dict[str, list[bytes]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> CocoFile:
        """The content of a file. Raises ValueError for a file of another form."""
        content = cls()
        for key, entry in read_entries(path):
            if key not in ("images", "annotations", "categories"):
                continue
            if not isinstance(entry, Mapping):
                raise ValueError(f"{path}: an entry of {key!r} is a {type(entry).__name__}, no object")
            if key == "annotations":
                kept = {name: entry[name] for name in KEPT if name in entry}
                line = json.dumps(kept, separators=(",", ":")).encode()
                content.annotations.setdefault(str(entry.get("image_id")), []).append(line)
            else:
                getattr(content, key)[str(entry.get("id"))] = entry  # 7 and "7" are the same id
        for name in ("images", "annotations"):
            if not getattr(content, name):
                raise ValueError(f"{path} has no list {name!r} with entries; give a file in COCO's form")
        return content

    def image_annotations(self, image_id: str) -> list[Annotation]:
        """The annotations of an image, in the file's order, without those to be ignored."""
        found = (json.loads(line) for line in self.annotations.get(image_id, ()))
        return [annotation for annotation in found if not annotation.get("ignore")]

    def category(self, id: str, annotation: Annotation) -> str:
        """The name of an annotation's category. Raises RecordError for one that the file does not list."""
        category = self.categories.get(str(annotation.get("category_id")))
        if category is None:
            raise RecordError(id, f"category_id={annotation.get('category_id')!r} is not listed in 'categories'")
        return plain_text(id, category.get("name"), "the category's name")


def read_instances(source: Source) -> Rows:
    """A row for each image: regions chosen at random are named in turn."""
    content = CocoFile.read(source.annotations)
    yield from coco_rows(source, content, content.category, NAME)


def coco_rows(
    source: Source, content: CocoFile, answer: Callable[[str, Annotation], str], wordings: Sequence[str]
) -> Rows:
    """A row for each image with annotations; a RecordError for each annotation and image that cannot be used.

    Args:
        answer: the answer for an annotation and its id; it may raise RecordError.
        wordings: of the question that is asked about each chosen region.
    """

    def read_region(id: str, annotation: Annotation, size: Size | None) -> Region:
        return Region(segmentation_spec(id, annotation, size), answer(id, annotation))

    for image_id, image in content.images.items():
        id = f"image {image_id}"
        annotations = [(f"{id}, annotation {one.get('id')}", one) for one in content.image_annotations(image_id)]
        yield from image_rows(source, id, file_names(image), size_of(image), annotations, read_region, wordings)
    for image_id in content.annotations:
        if image_id not in content.images:
            reason = f"annotations name image_id={image_id}, which is not listed in 'images'"
            yield RecordError(f"image {image_id}", reason)
