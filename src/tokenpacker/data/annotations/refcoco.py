"""RefCOCO, RefCOCO+ and RefCOCOg: a region is referred to so that no other fits. RefCOCO+ says nothing of places.

Two public forms are read:

    refs as JSON      a list of {"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent", ...}]}, beside COCO's
                      `instances.json`, which has the masks (Yu et al., 2016). Published as a pickle, which is refused:
                      a pickle can run anything. docs/regions-data.md shows how to make JSON of it without that.
    COCO's form       `images` with a `caption` each, as MDETR writes it, the masks in `annotations`
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations import wording
from tokenpacker.data.annotations.coco import (
    Annotation,
    Ask,
    CocoFile,
    Region,
    attempt,
    identity,
    one_by_one,
    region_of,
    row_of_regions,
    size_of,
    sorted_out,
)
from tokenpacker.data.annotations.entries import read_entries, read_list
from tokenpacker.data.annotations.reader import Rows, Size, Source, plain_text
from tokenpacker.data.rows import RecordError

PICKLES = (".p", ".pkl", ".pickle")
INSTANCES = "instances.json"


def read_refcoco(source: Source) -> Rows:
    """A row for each image: the expressions of its regions, which may say where they are."""
    yield from _read(source, wording.REFER_FORM)


def read_refcoco_plus(source: Source) -> Rows:
    """A row for each image: the expressions of its regions, which say what they look like."""
    yield from _read(source, wording.REFER_BY_LOOKS_FORM)


def _read(source: Source, form: str) -> Rows:
    path, ask = source.annotations, one_by_one(wording.REFER, form)
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run anything when it is read; make JSON of it once, as docs/regions-data.md"
            " shows"
        )
    first = next(read_entries(path), None)
    yield from _read_refs(source, ask) if first is None or first[0] == "" else _read_captioned(source, ask)


def _read_refs(source: Source, ask: Ask) -> Rows:
    instances = source.instances or source.annotations.with_name(INSTANCES)
    if not instances.is_file():
        raise ValueError(f"{instances} does not exist; give COCO's annotations that the refs name with --instances")
    refs = _refs_by_image(source)
    content = CocoFile.read(replace(source, annotations=instances))
    for image_id, entries in refs.items():
        id = f"image {image_id}"
        image = content.images.get(image_id)
        if image is None:
            yield RecordError(id, f"image_id={image_id} is not listed in {instances.name}")
            continue
        by_id = {identity(annotation.get("id")): annotation for annotation in content.image_annotations(image_id)}
        regions, problems = sorted_out(
            attempt(_referred, f"{id}, ref {ref.get('ref_id')}", ref, by_id, size_of(image), source) for ref in entries
        )
        yield from problems
        if regions:
            yield row_of_regions(source, id, image, regions, ask)


def _refs_by_image(source: Source) -> dict[str, list[Mapping[str, Any]]]:
    """The refs of the wanted split. Raises ValueError when there are none."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    splits = set()
    for ref in read_list(source.annotations):
        if not isinstance(ref, Mapping):
            raise ValueError(f"{source.annotations}: a ref is a {type(ref).__name__}, no object; see the format")
        splits.add(str(ref.get("split")))
        if ref.get("split") == source.split:
            found.setdefault(identity(ref.get("image_id")), []).append(ref)
    if not found:
        there = ", ".join(sorted(splits)) or "no refs at all"
        raise ValueError(f"{source.annotations} has no refs of split={source.split!r} but {there}; choose with --split")
    return found


def _referred(
    id: str, ref: Mapping[str, Any], by_id: Mapping[str, Annotation], size: Size | None, source: Source
) -> Region:
    """The region of a ref; of several expressions the seed takes one. Raises RecordError."""
    annotation, sentences = by_id.get(identity(ref.get("ann_id"))), ref.get("sentences")
    if annotation is None:
        raise RecordError(id, f"ann_id={ref.get('ann_id')!r} is no annotation of the image")
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, Mapping) for s in sentences):
        raise RecordError(id, "the ref has no 'sentences'")
    sentence = source.chance(id).choice(sentences)
    text = plain_text(id, sentence.get("sent", sentence.get("raw")), "the sentence")
    return region_of(id, annotation, size, lambda *_: text)


def _read_captioned(source: Source, ask: Ask) -> Rows:
    """Each expression is an image of its own there; those of one picture come together."""
    content = CocoFile.read(source)
    pictures: dict[str, list[Mapping[str, Any]]] = {}
    for image in content.images.values():
        pictures.setdefault(str(image.get("file_name")), []).append(image)
    for file_name, images in pictures.items():
        regions, problems = sorted_out(
            attempt(_captioned, f"image {image.get('id')}", annotation, image, size_of(images[0]))
            for image in images
            for annotation in content.image_annotations(identity(image.get("id")))
        )
        yield from problems
        if regions:
            yield row_of_regions(source, Path(file_name).stem, images[0], regions, ask)


def _captioned(id: str, annotation: Annotation, image: Mapping[str, Any], size: Size | None) -> Region:
    """The region of an expression; `size` is that of its picture, as its first expression says. Raises RecordError."""
    if size_of(image) != size:
        raise RecordError(id, f"{image.get('file_name')} has another height and width than before", "other size")
    text = plain_text(id, image.get("caption"), "the caption")
    return region_of(id, annotation, size, lambda *_: text)
