"""Visual Genome: a region is described in a phrase (Krishna et al., 2017).

Two public forms are read:

    region_descriptions.json   a list of {"id", "regions": [{"region_id", "x", "y", "width", "height", "phrase"}]};
                               regions are boxes, the picture is `VG_100K/ID.jpg` or `VG_100K_2/ID.jpg`
    COCO's form                with a `caption` for each annotation, as Osprey's authors publish it with masks
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tokenpacker.data.annotations import wording
from tokenpacker.data.annotations.coco import (
    Annotation,
    CocoFile,
    Region,
    attempt,
    one_by_one,
    rows_of_images,
    sorted_out,
)
from tokenpacker.data.annotations.entries import read_entries, read_list
from tokenpacker.data.annotations.reader import Rows, Source, make_row, plain_text
from tokenpacker.data.annotations.region_specs import box_spec
from tokenpacker.data.rows import RecordError

FOLDERS = ("VG_100K/", "VG_100K_2/", "")
ASK = one_by_one(wording.PHRASE, wording.PHRASE_FORM)


def read_visual_genome(source: Source) -> Rows:
    """A row for each image: some of its regions are described in turn."""
    first = next(read_entries(source.annotations), None)
    if first is None or first[0] == "":
        yield from _read_descriptions(source)
        return

    def caption(id: str, annotation: Annotation) -> str:
        return plain_text(id, annotation.get("caption"), "the caption")

    yield from rows_of_images(source, CocoFile.read(source), caption, ASK)


def _read_descriptions(source: Source) -> Rows:
    for place, entry in enumerate(read_list(source.annotations), 1):
        if not isinstance(entry, Mapping) or not isinstance(entry.get("regions"), list):
            yield RecordError(f"entry {place}", "the entry has no list 'regions'")
            continue
        image_id = _image_id(entry)
        id = f"image {image_id}"
        regions, problems = sorted_out(
            attempt(_region, f"{id}, region {place}", region) for place, region in enumerate(entry["regions"], 1)
        )
        yield from problems
        if not regions:
            continue
        chance = source.chance(id)
        chosen = source.chosen(regions, chance)
        try:
            path = source.image(id, *(f"{folder}{image_id}.jpg" for folder in FOLDERS))
            yield make_row(id, path, ASK(chosen, chance), [region.spec for region in chosen])
        except RecordError as error:
            yield error


def _image_id(entry: Mapping[str, Any]) -> Any:
    """The entry's `id`, or `image_id` as its regions have it too."""
    found = entry.get("id", entry.get("image_id"))
    if found is None and entry["regions"] and isinstance(entry["regions"][0], Mapping):
        found = entry["regions"][0].get("image_id")
    return found


def _region(id: str, entry: Any) -> Region:
    """The box and phrase of a region. Raises RecordError."""
    if not isinstance(entry, Mapping):
        raise RecordError(id, f"the region is a {type(entry).__name__}, no object")
    box: list[Any] = [entry.get(key) for key in ("x", "y", "width", "height")]
    if not all(type(value) in (int, float) for value in box):
        raise RecordError(id, "the region has no x, y, width and height in numbers", "malformed region")
    x, y, width, height = box
    return Region(box_spec(id, (x, y, x + width, y + height)), plain_text(id, entry.get("phrase"), "the phrase"))
