"""Visual Genome: a region is described in a phrase (Krishna et al., 2017).

Two public forms are read:

    region_descriptions.json   a list of {"id", "regions": [{"region_id", "x", "y", "width", "height", "phrase"}]};
                               regions are boxes, the picture is `VG_100K/ID.jpg` or `VG_100K_2/ID.jpg`
    COCO's form                with a `caption` for each annotation, as Osprey's authors publish it with masks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenpacker.data.annotations.coco import Annotation, CocoFile, coco_rows
from tokenpacker.data.annotations.entries import is_list, read_list
from tokenpacker.data.annotations.reader import Region, Rows, Source, image_rows, plain_text
from tokenpacker.data.annotations.region_specs import box_spec
from tokenpacker.data.annotations.wording import PHRASE
from tokenpacker.data.rows import RecordError

FOLDERS = ("VG_100K/", "VG_100K_2/", "")


def read_visual_genome(source: Source) -> Rows:
    """A row for each image: some of its regions are described in turn."""
    if is_list(source.annotations):
        yield from _read_descriptions(source)
    else:
        yield from coco_rows(source, CocoFile.read(source.annotations), _caption, PHRASE)


def _caption(id: str, annotation: Annotation) -> str:
    return plain_text(id, annotation.get("caption"), "the caption")


def _read_descriptions(source: Source) -> Rows:
    for place, entry in enumerate(read_list(source.annotations), 1):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("regions"), list):
            yield RecordError(f"entry {place}", "the entry has no list 'regions'")
            continue
        image_id = _image_id(entry)
        id, names = f"image {image_id}", [f"{folder}{image_id}.jpg" for folder in FOLDERS]
        regions = [(f"{id}, region {place}", region) for place, region in enumerate(entry["regions"], 1)]
        yield from image_rows(source, id, names, None, regions, _region, PHRASE)


def _image_id(entry: Mapping[str, Any]) -> Any:
    """The entry's `id` or `image_id`, or the `image_id` that its regions have."""
    found = entry.get("id", entry.get("image_id"))
    if found is None and entry["regions"] and isinstance(entry["regions"][0], Mapping):
        found = entry["regions"][0].get("image_id")
    return found


def _region(id: str, entry: Any, _size: object) -> Region:
    """The box and phrase of a region. Raises RecordError."""
    if not isinstance(entry, Mapping):
        raise RecordError(id, f"the region is a {type(entry).__name__}, no object")
    box: list[Any] = [entry.get(key) for key in ("x", "y", "width", "height")]
    if not all(type(value) in (int, float) for value in box):
        raise RecordError(id, "the region has no x, y, width and height in numbers", "malformed region")
    x, y, width, height = box
    return Region(box_spec(id, (x, y, x + width, y + height)), plain_text(id, entry.get("phrase"), "the phrase"))
