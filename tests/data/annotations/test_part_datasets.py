from __future__ import annotations

import contextlib
import copy
import struct
import zlib

import numpy as np
import pytest

from region_rows import SQUARE, TRIANGLE, texts
from tokenpacker.data.annotations.matlab import MatlabError, read_matlab
from tokenpacker.data.annotations.part_datasets import part_word
from tokenpacker.hf.regions.masks import to_mask

FILE = {
    "images": [{"id": 7, "file_name": "a.jpg", "height": 40, "width": 60}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 0, "segmentation": SQUARE},
        {"id": 2, "image_id": 7, "category_id": 1, "segmentation": TRIANGLE},
    ],
}


def answers(rows):
    return sorted(answer for row in rows for _, answer in texts(row))


@pytest.fixture(autouse=True)
def image(images):
    images("a.jpg", "2008_000008.jpg")


def test_part_imagenet_answers_object_and_part_with_its_words_put_right(converted):
    content = FILE | {"categories": [{"id": 0, "name": "Quadruped Head"}, {"id": 1, "name": "Car Tier"}]}
    rows, _ = converted("part-imagenet", content)
    assert answers(rows) == ["car: tire", "quadruped: head"]
    assert all(question.endswith("Answer as object: part.") for question, _ in texts(rows[0]))


def test_pascal_part_in_cocos_form_answers_object_and_part(converted):
    content = FILE | {"categories": [{"id": 0, "name": "car:side"}, {"id": 1, "name": "potted plant:pot"}]}
    rows, _ = converted("pascal-part", content)
    assert answers(rows) == ["car: side", "potted plant: pot"]


def test_a_whole_object_is_answered_without_a_part(converted):
    content = copy.deepcopy(FILE) | {"categories": [{"id": 0, "name": "person"}, {"id": 1, "name": "person:ear"}]}
    assert answers(converted("pascal-part", content)[0]) == ["person", "person: ear"]


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("lear", "ear"),
        ("rear", "ear"),
        ("rebrow", "eyebrow"),
        ("lfuleg", "leg"),
        ("lfpa", "paw"),
        ("rbho", "hoof"),
        ("wheel_12", "wheel"),
        ("chainwheel", "chain wheel"),
        ("fliplate", "license plate"),
        ("hroofside", "roof"),
        ("antenna", None),
    ],
)
def test_names_of_parts_become_words_without_sides_and_numbers(name, word):
    assert part_word(name) == word


# MATLAB's file written by hand, after "MAT-File Format": an element is a number for its kind, its size and its bytes.


def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def small(kind, data):
    return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\0")


def matrix(kind, shape, name, *body):
    flags = element(6, struct.pack("<II", kind, 0))
    label = small(1, name) if 0 < len(name) <= 4 else element(1, name)
    return element(14, flags + element(5, struct.pack("<2i", *shape)) + label + b"".join(body))


def text(value):
    return matrix(4, (1, len(value)), b"", element(16, value.encode()))


def mask(array):
    return matrix(9, array.shape, b"", element(2, array.astype(np.uint8).tobytes(order="F")))


def structs(name, *entries):
    fields = list(entries[0]) if entries else ["none"]
    names = b"".join(field.encode().ljust(32, b"\0") for field in fields)
    values = (entry[field] for entry in entries for field in fields)
    return matrix(2, (1, len(entries)), name, small(5, struct.pack("<i", 32)), element(1, names), *values)


def mat_file(*variables, packed=False):
    if packed:
        variables = [struct.pack("<II", 15, len(data)) + data for data in map(zlib.compress, variables)]
    return b"MATLAB 5.0 MAT-file".ljust(124) + b"\0\x01IM" + b"".join(variables)


EAR = np.zeros((40, 60), dtype=bool)
EAR[3:9, 10:13] = EAR[0, 0] = True


@pytest.fixture
def anno():
    parts = structs(
        b"",
        {"part_name": text("lear"), "mask": mask(EAR)},
        {"part_name": text("antenna"), "mask": mask(EAR)},
        {"part_name": text("tail"), "mask": mask(EAR & False)},
    )
    whole = {"class": text("pottedplant"), "class_ind": mask(np.ones((1, 1))), "mask": mask(EAR), "parts": parts}
    bare = whole | {"parts": matrix(9, (0, 0), b"", element(9, b""))}
    return structs(b"anno", {"imname": text("2008_000008"), "objects": structs(b"", whole, bare)})


@pytest.mark.parametrize("packed", [False, True])
def test_pascal_parts_own_files_give_their_masks(converted, tmp_path, anno, packed):
    folder = tmp_path / "Annotations_Part"
    folder.mkdir()
    (folder / "2008_000008.mat").write_bytes(mat_file(anno, packed=packed))
    (folder / "2008_000009.mat").write_bytes(mat_file(anno)[:400])
    (row,), rejects = converted("pascal-part", None, name="Annotations_Part")
    assert row["image"] == "2008_000008.jpg"
    assert [answer for _, answer in texts(row)] == ["potted plant: ear"]
    assert (to_mask(row["regions"][0][0], (40, 60)) == EAR).all()
    assert [reject["id"] for reject in rejects] == ["2008_000008", "2008_000008", "2008_000009"]
    assert "'antenna'" in rejects[0]["reason"]
    assert "no mask with pixels" in rejects[1]["reason"]
    assert "cut off" in rejects[2]["reason"]


def test_an_image_of_another_size_than_its_masks_is_a_reject(converted, images, tmp_path, image_of, anno):
    folder = tmp_path / "Annotations_Part"
    folder.mkdir()
    (folder / "2008_000008.mat").write_bytes(mat_file(anno))
    image_of(80, 120).save(images() / "2008_000008.jpg")
    (folder / "a.mat").write_bytes(mat_file(anno))
    (row,), rejects = converted("pascal-part", None, name="Annotations_Part")
    assert row["image"] == "a.jpg"
    assert "of an image of 60x40 (width x height), and 2008_000008.jpg is 120x80" in rejects[2]["reason"]


@pytest.mark.parametrize("at", [0, 100, 127, 128, 130, 160, 200, 300, 500])
def test_a_damaged_file_of_matlab_is_refused_and_never_more(tmp_path, anno, at):
    data = mat_file(anno)
    path = tmp_path / "a.mat"
    path.write_bytes(data[:at])
    if at == 128:
        assert read_matlab(path) == {}  # a file without variables
    else:
        with pytest.raises(MatlabError):
            read_matlab(path)


def test_any_changed_byte_of_a_matlab_file_gives_a_value_or_the_one_error(tmp_path, anno):
    data = bytearray(mat_file(anno)[:1200])
    path = tmp_path / "a.mat"
    random = np.random.default_rng(0)
    for _ in range(300):
        broken = bytearray(data)
        broken[random.integers(124, len(data))] = random.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(MatlabError):
            assert isinstance(read_matlab(path), dict)
