from __future__ import annotations

import json

import numpy as np
import pytest

from region_rows import SQUARE
from tokenpacker.data.annotations import FORMATS, write_rows
from tokenpacker.data.annotations.region_specs import mask_spec
from tokenpacker.data.annotations.wording import (
    DETAIL,
    LISTED,
    NAME,
    PART,
    PHRASE,
    REFER,
)
from tokenpacker.hf.regions.masks import to_mask

ENTRY = {
    "id": 1,
    "file_name": "1.jpg",
    "annotation": [{"segmentation": SQUARE}],
    "conversations": [{"from": "human", "value": "What is <region1>?"}, {"from": "gpt", "value": "A dog."}],
}


@pytest.fixture
def annotations(tmp_path, images):
    images("coco/1.jpg")
    path = tmp_path / "short.json"
    path.write_text(json.dumps([ENTRY]))
    return path


def test_paths_start_from_a_root_that_several_data_sets_share(tmp_path, images, annotations):
    output = tmp_path / "new" / "rows.jsonl"
    write_rows("osprey-short", annotations, images() / "coco", output, root=images())
    assert json.loads(output.read_text())["image"] == "coco/1.jpg"


def test_rows_of_several_formats_follow_each_other_in_one_file(tmp_path, images, annotations):
    from tokenpacker.data.records import open_records

    parts = []
    for format in ("osprey-short", "osprey-posneg"):
        parts.append(tmp_path / f"{format}.jsonl")
        write_rows(format, annotations, images() / "coco", parts[-1], root=images())
    whole = tmp_path / "stage3.jsonl"
    whole.write_bytes(b"".join(part.read_bytes() for part in parts))
    records = open_records(whole, images())
    assert [len(record.regions[0]) for record in (records[0], records[1])] == [1, 1]


def test_the_file_appears_whole_or_not_at_all(tmp_path, images, annotations):
    output = tmp_path / "rows.jsonl"
    output.write_text("older\n")
    annotations.write_text(json.dumps([ENTRY])[:-1] + ", {broken")
    with pytest.raises(ValueError, match="no valid JSON"):
        write_rows("osprey-short", annotations, images() / "coco", output)
    assert output.read_text() == "older\n"
    assert not list(tmp_path.glob("*.partial"))


def test_a_second_run_replaces_the_rejects_of_the_first(tmp_path, images, annotations):
    output = tmp_path / "rows.jsonl"
    annotations.write_text(json.dumps([ENTRY, ENTRY | {"file_name": "none.jpg"}]))
    first = write_rows("osprey-short", annotations, images() / "coco", output)
    assert (first.rows, first.regions, first.rejected) == (1, 1, {"missing image": 1})
    assert first.rejected_share == 0.5
    assert json.loads(first.rejects.read_text())["id"] == "entry 2"
    annotations.write_text(json.dumps([ENTRY]))
    second = write_rows("osprey-short", annotations, images() / "coco", output)
    assert second.rejects is None
    assert not first.rejects.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "cocoa"}, "format='cocoa' is unknown; use one of coco, refcoco"),
        ({"annotations": "nowhere.json"}, "nowhere.json do not exist"),
        ({"images": "nowhere"}, "images=nowhere is no folder"),
        ({"root": "nowhere"}, "root=nowhere is no folder"),
        ({"max_regions": 0}, "max_regions=0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(tmp_path, images, annotations, changes, message):
    options = {"format": "coco", "annotations": annotations, "images": images(), "output": tmp_path / "o"} | changes
    with pytest.raises(ValueError, match=message):
        write_rows(**options)


def test_images_must_lie_below_the_root(tmp_path, images, annotations):
    with pytest.raises(ValueError, match="choose a root above it"):
        write_rows("coco", annotations, images(), tmp_path / "o", root=images() / "coco")


def test_every_format_refuses_a_file_of_another_one_and_says_so(tmp_path, images):
    images()
    path = tmp_path / "other.json"
    for content in ("{}", "[]", "[1]", '{"a": [1]}', '[{"b": 1}]', "null"):
        path.write_text(content)
        for format in FORMATS:
            with pytest.raises(ValueError, match=r"\S"):
                write_rows(format, path, images(), tmp_path / "rows.jsonl")


def test_a_mask_written_as_runs_is_the_same_mask_read_again():
    random = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.9):
        mask = random.random((7, 5)) < share
        assert (to_mask(mask_spec(mask), (7, 5)) == mask).all()


HALF = "\ud83d"  # of an emoji


@pytest.mark.parametrize(
    ("format", "entry"),
    [
        ("osprey-short", {"conversations": [{"from": "human", "value": HALF}, {"from": "gpt", "value": "A cat."}]}),
        ("osprey-detail", {"description": [f"<region1>: {HALF}"]}),
    ],
)
def test_a_text_with_half_a_character_is_a_reject(converted, images, format, entry):
    images("coco/1.jpg")
    with pytest.raises(ValueError, match=r"gives no row as .*is half a character"):
        converted(format, [{**ENTRY, "file_name": "coco/1.jpg", **entry}])


@pytest.mark.parametrize("wordings", [NAME, PART, REFER, PHRASE, DETAIL, LISTED])
def test_every_task_has_several_wordings_with_one_place_for_regions(wordings):
    assert len(set(wordings)) >= 4
    for wording in wordings:
        assert wording.count("{region}") + wording.count("{regions}") == 1
