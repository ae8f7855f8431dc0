"""Parts of objects: PascalPart and PartImageNet. Answers are `object: part`, or the object alone for a whole one.

    part-imagenet   PartImageNet's own files in COCO's form; a category is `Quadruped Head` (He et al., 2022)
    pascal-part     a file in COCO's form with categories `person:ear`, as VLPart makes of the data set (Sun et al.,
                    2023), or the data set's own folder of .mat files, one for each image (Chen et al., 2014)

In .mat files a part is called `lfuleg`, the left front upper leg, or `wheel_2`. Sides, heights and numbers are dropped,
as VLPart drops them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from tokenpacker.data.annotations.coco import Annotation, CocoFile, coco_rows
from tokenpacker.data.annotations.matlab import MatlabError, read_matlab
from tokenpacker.data.annotations.reader import Region, Rows, Source, image_rows
from tokenpacker.data.annotations.region_specs import KIND, mask_spec
from tokenpacker.data.annotations.wording import PART
from tokenpacker.data.rows import RecordError

# PartImageNet spells a tire "Tier", and cuts "Side Mirror" short.
CORRECTED = {"tier": "tire", "side": "side mirror"}
# Endings of part names in PascalPart's .mat files that are not the word itself.
ABBREVIATED = {
    "backside": "back",
    "chainwheel": "chain wheel",
    "ebrow": "eyebrow",
    "frontside": "front",
    "ho": "hoof",
    "leftside": "side",
    "liplate": "license plate",
    "pa": "paw",
    "rightside": "side",
    "roofside": "roof",
}
OBJECT_NAMES = {"pottedplant": "potted plant", "tvmonitor": "tv monitor", "diningtable": "dining table"}
_NUMBER = re.compile(r"_\d+$")
_PART = re.compile(  # the search finds the longest ending: a chain wheel is no wheel
    r"(arm|beak|body|cap|coach|door|ear|engine|eye|foot|hair|hand|handlebar|head|headlight|horn|leg|mirror|mouth|muzzle"
    rf"|neck|nose|plant|pot|saddle|screen|stern|tail|torso|wheel|window|wing|{'|'.join(ABBREVIATED)})$"
)
Part = tuple[str, str, Any]  # name of the object, name of the part, mask


def read_part_imagenet(source: Source) -> Rows:
    """A row for each image: parts chosen at random are named in turn."""
    yield from _read_file(source, " ", CORRECTED)


def read_pascal_part(source: Source) -> Rows:
    """A row for each image: parts chosen at random are named in turn."""
    if source.annotations.is_dir():
        yield from _read_folder(source)
    else:
        yield from _read_file(source, ":", {})


def _read_file(source: Source, separator: str, corrected: Mapping[str, str]) -> Rows:
    """A file in COCO's form, whose categories name the object and, behind the separator, the part."""
    content = CocoFile.read(source.annotations)

    def answer(id: str, annotation: Annotation) -> str:
        whole, _, part = content.category(id, annotation).lower().partition(separator)
        whole, part = whole.strip(), part.strip()
        return f"{whole}: {corrected.get(part, part)}" if part else whole

    yield from coco_rows(source, content, answer, PART)


def part_word(name: str) -> str | None:
    """The word for a part with a name of a .mat file, such as `lfuleg` or `wheel_2`; None for an unknown one."""
    match = _PART.search(_NUMBER.sub("", name.strip().lower()))
    return None if match is None else ABBREVIATED.get(match[1], match[1])


def _read_folder(source: Source) -> Rows:
    paths = sorted(source.annotations.glob("*.mat"))
    if not paths:
        raise ValueError(f"folder {source.annotations} holds no .mat files; give PascalPart's Annotations_Part")
    for path in paths:
        id = path.stem
        try:
            parts = [(id, part) for part in _parts(read_matlab(path))]
        except MatlabError as error:
            yield RecordError(id, str(error))
            continue
        size = next((mask.shape for _, (*_, mask) in parts if _has_pixels(mask)), None)
        yield from image_rows(source, id, [f"{id}.jpg"], size, parts, _region, PART)


def _parts(content: dict[str, Any]) -> Iterator[Part]:
    """The parts of a file: `anno` has `objects`, each with its `class` and `parts` of a `part_name` and a `mask`."""
    for annotation in _structs(content.get("anno")):
        for thing in _structs(annotation.get("objects")):
            for part in _structs(thing.get("parts")):
                yield str(thing.get("class", "")).strip(), str(part.get("part_name", "")), part.get("mask")


def _structs(value: Any) -> list[dict[str, Any]]:
    """The structs of a file; none if it has something else, such as the empty matrix for no parts."""
    return value if isinstance(value, list) else []


def _region(id: str, part: Part, _size: object) -> Region:
    """The region of a part. Raises RecordError."""
    whole, name, mask = part
    word = part_word(name)
    if word is None or not whole:
        raise RecordError(id, f"part {name!r} of {whole!r} is unknown", KIND)
    if not _has_pixels(mask):
        raise RecordError(id, f"part {name!r} has no mask with pixels", KIND)
    return Region(mask_spec(mask), f"{OBJECT_NAMES.get(whole, whole)}: {word}")


def _has_pixels(mask: Any) -> bool:
    return getattr(mask, "ndim", 0) == 2 and bool(mask.any())
