"""RefCOCO, RefCOCO+ and RefCOCOg: an expression refers to one region and fits no other. RefCOCO+ has no places in it.

Two public forms are read:

    refs as JSON      a list of {"ref_id", "ann_id", "image_id", "split", "sentences": [{"sent", ...}]}, beside COCO's
                      `instances.json`, which has the masks (Yu et al., 2016). Published as a pickle, which is refused:
                      a pickle can run anything. docs/regions-data.md shows how to make JSON of it without that.
    COCO's form       `images` with a `caption` each, as MDETR writes it, the masks in `annotations`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenpacker.data.annotations.coco import Annotation, CocoFile
from tokenpacker.data.annotations.entries import is_list, read_list
from tokenpacker.data.annotations.reader import Region, Rows, Source, file_names, image_rows, plain_text, size_of
from tokenpacker.data.annotations.region_specs import Size, segmentation_spec
from tokenpacker.data.rows import RecordError

PICKLES = (".p", ".pkl", ".pickle")
INSTANCES = "instances.json"


def read_refcoco(source: Source, wordings: Sequence[str]) -> Rows:
    """A row for each image: the expressions of its regions."""
    path = source.annotations
    if path.suffix.lower() in PICKLES:
        raise ValueError(
            f"{path} is a pickle, which can run anything when it is read; make JSON of it once, as docs/regions-data.md"
            " shows"
        )
    yield from _read_refs(source, wordings) if is_list(path) else _read_captioned(source, wordings)


def _read_refs(source: Source, wordings: Sequence[str]) -> Rows:
    instances = source.instances or source.annotations.with_name(INSTANCES)
    if not instances.is_file():
        raise ValueError(f"{instances} does not exist; give COCO's annotations that the refs name with --instances")
    refs_by_image = _refs_by_image(source)
    content = CocoFile.read(instances)

    def read_region(id: str, pair: tuple[Mapping[str, Any], Annotation | None], size: Size | None) -> Region:
        ref, annotation = pair
        if annotation is None:
            raise RecordError(id, f"ann_id={ref.get('ann_id')!r} is no annotation of the image")
        answer = _expression(source, id, ref.get("sentences"))
        return Region(segmentation_spec(id, annotation, size), answer)

    for image_id, refs in refs_by_image.items():
        id, image = f"image {image_id}", content.images.get(image_id)
        if image is None:
            yield RecordError(id, f"image_id={image_id} is not listed in {instances.name}")
            continue
        by_id = {str(annotation.get("id")): annotation for annotation in content.image_annotations(image_id)}
        pairs = [(f"{id}, ref {ref.get('ref_id')}", (ref, by_id.get(str(ref.get("ann_id"))))) for ref in refs]
        yield from image_rows(source, id, file_names(image), size_of(image), pairs, read_region, wordings)


def _refs_by_image(source: Source) -> dict[str, list[Mapping[str, Any]]]:
    """The refs of the wanted split. Raises ValueError if there are none."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    splits = set()
    for ref in read_list(source.annotations):
        if not isinstance(ref, Mapping):
            raise ValueError(f"{source.annotations}: a ref is a {type(ref).__name__}, no object; see the format")
        splits.add(str(ref.get("split")))
        if ref.get("split") == source.split:
            found.setdefault(str(ref.get("image_id")), []).append(ref)
    if not found:
        there = ", ".join(sorted(splits)) or "no refs at all"
        raise ValueError(f"{source.annotations} has no refs of split={source.split!r} but {there}; choose with --split")
    return found


def _expression(source: Source, id: str, sentences: Any) -> str:
    """One of a ref's expressions, chosen by the seed. Raises RecordError."""
    if not isinstance(sentences, list) or not sentences or not all(isinstance(s, Mapping) for s in sentences):
        raise RecordError(id, "the ref has no 'sentences'")
    sentence = source.chance(id).choice(sentences)
    return plain_text(id, sentence.get("sent", sentence.get("raw")), "the sentence")


def _read_captioned(source: Source, wordings: Sequence[str]) -> Rows:
    """There, each expression is an image of its own; those of one picture are put together."""
    content = CocoFile.read(source.annotations)
    pictures: dict[str, list[Mapping[str, Any]]] = {}
    for image in content.images.values():
        pictures.setdefault(str(image.get("file_name")), []).append(image)
    for file_name, images in pictures.items():
        pairs = [
            (f"image {image.get('id')}", (image, annotation))
            for image in images
            for annotation in content.image_annotations(str(image.get("id")))
        ]
        first = images[0]
        yield from image_rows(
            source, Path(file_name).stem, file_names(first), size_of(first), pairs, _captioned, wordings
        )


def _captioned(id: str, pair: tuple[Mapping[str, Any], Annotation], size: Size | None) -> Region:
    """The region of an image's caption; `size` is that of the picture's first image. Raises RecordError."""
    image, annotation = pair
    if size_of(image) != size:
        raise RecordError(id, f"{image.get('file_name')} has another height and width than before", "other size")
    answer = plain_text(id, image.get("caption"), "the caption")
    return Region(segmentation_spec(id, annotation, size), answer)
