"""Parts of objects: PascalPart and PartImageNet. Answers are `object: part`, or the object alone for a whole one.

    part-imagenet   PartImageNet's own files in COCO's form; a category is `Quadruped Head` (He et al., 2022)
    pascal-part     a file in COCO's form with categories `person:ear`, as VLPart makes of the data set (Sun et al.,
                    2023), or the data set's own folder of .mat files, one for each image (Chen et al., 2014)

In .mat files a part is called `lfuleg`, the left front upper leg, or `wheel_2`. Sides, heights and numbers are dropped,
as VLPart drops them.
"""

from __future__ import annotations

import re
from typing import Any

from tokenpacker.data.annotations import wording
from tokenpacker.data.annotations.coco import Annotation, CocoFile, Region, one_by_one, row_of_regions, rows_of_images
from tokenpacker.data.annotations.matlab import MatlabError, read_matlab
from tokenpacker.data.annotations.reader import Rows, Source
from tokenpacker.data.annotations.region_specs import mask_spec
from tokenpacker.data.rows import RecordError

# PartImageNet spells a tire "Tier", and cuts "Side Mirror" short.
CORRECTED = {"tier": "tire", "side": "side mirror"}
# How the names of parts in PascalPart's .mat files end, where that is not the word itself.
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
ASK = one_by_one(wording.PART, wording.PART_FORM)
_NUMBER = re.compile(r"_\d+$")
_PART = re.compile(  # what begins first is the longest: a chain wheel is no wheel
    r"(arm|beak|body|cap|coach|door|ear|engine|eye|foot|hair|hand|handlebar|head|headlight|horn|leg|mirror|mouth|muzzle"
    rf"|neck|nose|plant|pot|saddle|screen|stern|tail|torso|wheel|window|wing|{'|'.join(ABBREVIATED)})$"
)


def read_part_imagenet(source: Source) -> Rows:
    """A row for each image: parts chosen by chance are named in turn."""
    content = CocoFile.read(source)

    def answer(id: str, annotation: Annotation) -> str:
        name = content.category(id, annotation).lower()
        whole, _, part = name.partition(" ")
        return f"{whole}: {CORRECTED.get(part, part)}" if part else whole

    yield from rows_of_images(source, content, answer, ASK)


def read_pascal_part(source: Source) -> Rows:
    """A row for each image: parts chosen by chance are named in turn."""
    if source.annotations.is_dir():
        yield from _read_folder(source)
        return
    content = CocoFile.read(source)

    def answer(id: str, annotation: Annotation) -> str:
        whole, _, part = content.category(id, annotation).lower().partition(":")
        return f"{whole.strip()}: {part.strip()}" if part else whole

    yield from rows_of_images(source, content, answer, ASK)


def part_word(name: str) -> str | None:
    """The word for a part as a .mat file names it, such as `lfuleg` or `wheel_2`; None for an unknown one."""
    match = _PART.search(_NUMBER.sub("", name.strip().lower()))
    return None if match is None else ABBREVIATED.get(match[1], match[1])


def _read_folder(source: Source) -> Rows:
    paths = sorted(source.annotations.glob("*.mat"))
    if not paths:
        raise ValueError(f"folder {source.annotations} holds no .mat files; give PascalPart's Annotations_Part")
    for path in paths:
        try:
            found, problems = _regions_of(path.stem, read_matlab(path))
        except MatlabError as error:
            yield RecordError(path.stem, str(error))
            continue
        yield from problems
        if found:
            height, width = found[0].spec["rle"]["size"]
            image = {"file_name": f"{path.stem}.jpg", "height": height, "width": width}
            yield row_of_regions(source, path.stem, image, found, ASK)


def _regions_of(id: str, content: dict[str, Any]) -> tuple[list[Region], list[RecordError]]:
    """The parts of a file: `anno` has `objects`, each with its `class` and `parts` of a `part_name` and a `mask`."""
    regions, problems = [], []
    for annotation in _structs(content.get("anno")):
        for thing in _structs(annotation.get("objects")):
            whole = str(thing.get("class", "")).strip()
            for part in _structs(thing.get("parts")):
                name, mask = str(part.get("part_name", "")), part.get("mask")
                word = part_word(name)
                if word is None or not whole:
                    problems.append(RecordError(id, f"part {name!r} of {whole!r} is unknown", "malformed region"))
                elif mask is None or getattr(mask, "ndim", 0) != 2 or not mask.any():
                    problems.append(RecordError(id, f"part {name!r} has no mask with pixels", "malformed region"))
                else:
                    regions.append(Region(mask_spec(mask), f"{OBJECT_NAMES.get(whole, whole)}: {word}"))
    return regions, problems


def _structs(value: Any) -> list[dict[str, Any]]:
    """The structs of a file; none where it has something else, such as the empty matrix for no parts."""
    return value if isinstance(value, list) else []
