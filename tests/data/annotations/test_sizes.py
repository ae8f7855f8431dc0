"""Regions of a picture that is not the one that was annotated lie elsewhere in it: such rows are left out."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from region_rows import SQUARE

INSTANCES = {
    "annotations": [{"id": 1, "image_id": 7, "category_id": 1, "segmentation": SQUARE, "caption": "a man"}],
    "categories": [{"id": 1, "name": "person"}],
}
REFS = [{"ref_id": 1, "ann_id": 1, "image_id": 7, "split": "train", "sentences": [{"sent": "left man"}]}]
ENTRY = {"file_name": "7.jpg", "annotation": [{"segmentation": SQUARE}]}
TALK = [{"from": "human", "value": "What is <region1>?"}, {"from": "gpt", "value": "A man."}]
LINE = {
    "objects": ["person"],
    "img_fn": "7.jpg",
    "question": ["Why", [0], "?"],
    "answer_choices": [["So"]],
    "answer_label": 0,
    "rationale_choices": [["Because"]],
    "rationale_label": 0,
}


def annotated(format, size, folder):
    """Annotations of a format, of an image of (height, width), and their file's name."""
    size = dict(zip(("height", "width"), size, strict=True))
    image = {"id": 7, "file_name": "7.jpg", **size}
    coco = {"images": [image], **INSTANCES}
    if format == "refs":
        (folder.parent / "instances.json").write_text(json.dumps(coco))
        return "refcoco", REFS, "refs.json"
    if format == "refcoco":
        return format, {"images": [{**image, "caption": "left man"}], **INSTANCES}, "annotations.json"
    if format == "vcr":
        metadata = f"of-{image['width']}.json"
        (folder / metadata).write_text(json.dumps({"boxes": [[2, 2, 20, 20]], "segms": [[]], **size}))
        return format, json.dumps(LINE | {"metadata_fn": metadata}), "train.jsonl"
    if format.startswith("osprey"):
        text = {"description": ["<region1>: A man."]} if format == "osprey-detail" else {"conversations": TALK}
        return format, [ENTRY | size | text], "annotations.json"
    return format, coco, "annotations.json"


FORMATS = [
    "coco",
    "part-imagenet",
    "pascal-part",
    "visual-genome",
    "refs",
    "refcoco",
    "vcr",
    "osprey-short",
    "osprey-posneg",
    "osprey-conversation",
    "osprey-detail",
    "osprey-part",
]


@pytest.mark.parametrize("format", FORMATS)
def test_an_image_of_another_size_than_its_annotations_say_is_a_reject(converted, images, format):
    folder = images("7.jpg")
    name, content, file = annotated(format, (40, 60), folder)
    (_,), rejects = converted(name, content, name=file)
    assert rejects == []
    name, content, file = annotated(format, (400, 600), folder)
    with pytest.raises(ValueError, match=r"annotations are of an image of 600x400 \(width x height\), and 7.jpg is"):
        converted(name, content, name=file)


def test_an_image_that_its_exif_turns_is_compared_as_it_is_seen(converted, images):
    folder = images("7.jpg", "8.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.open(folder / "8.jpg").save(folder / "7.jpg", exif=exif)  # stored as 40 x 60, seen as 60 x 40
    _, content, _ = annotated("coco", (60, 40), folder)
    (row,), rejects = converted("coco", content)
    assert rejects == []
    _, content, _ = annotated("coco", (40, 60), folder)
    content["images"].append({"id": 8, "file_name": "8.jpg", "height": 40, "width": 60})
    content["annotations"] = [*INSTANCES["annotations"], {**INSTANCES["annotations"][0], "image_id": 8}]
    (row,), (reject,) = converted("coco", content)
    assert row["image"] == "8.jpg"
    assert (reject["id"], reject["kind"]) == ("image 7", "other size")
    assert "7.jpg is 40x60; its EXIF orientation turns it, and the annotations ignore that" in reject["reason"]


def test_expressions_of_one_picture_agree_on_its_size(converted, images):
    folder = images("7.jpg")
    _, content, _ = annotated("refcoco", (40, 60), folder)
    content["images"].append({**content["images"][0], "id": 8, "width": 61})
    content["annotations"] = [*INSTANCES["annotations"], {**INSTANCES["annotations"][0], "image_id": 8}]
    (row,), (reject,) = converted("refcoco", content)
    assert len(row["regions"][0]) == 1
    assert (reject["id"], reject["kind"]) == ("image 8", "other size")


def test_an_image_that_is_damaged_is_a_reject_when_its_size_is_looked_at(converted, images):
    folder = images("7.jpg")
    (folder / "7.jpg").write_bytes(b"no picture")
    _, content, _ = annotated("coco", (40, 60), folder)
    with pytest.raises(ValueError, match=r"gives no row as coco.*7.jpg"):
        converted("coco", content)
