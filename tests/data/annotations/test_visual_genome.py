from __future__ import annotations

import pytest

from region_rows import SQUARE, texts


def region(number, phrase, x=2, y=3, width=10, height=20):
    return {"region_id": number, "x": x, "y": y, "width": width, "height": height, "phrase": phrase}


@pytest.fixture(autouse=True)
def image(images):
    images("VG_100K/1.jpg", "VG_100K_2/2.jpg")


def test_regions_are_described_in_phrases(converted):
    content = [{"id": 1, "regions": [region(5, "a red clock"), region(6, "wet street", x=20.5)]}]
    (row,), rejects = converted("visual-genome", content)
    assert rejects == []
    assert row["image"] == "VG_100K/1.jpg"
    found = {answer: region["box"] for (_, answer), region in zip(texts(row), row["regions"][0], strict=True)}
    assert found == {"a red clock": [2, 3, 12, 23], "wet street": [20.5, 3, 30.5, 23]}
    assert all(question.endswith("Answer with a short phrase.") for question, _ in texts(row))


def test_three_regions_are_taken_of_an_image_as_in_the_original(converted):
    content = [{"id": 1, "regions": [region(number, f"thing {number}") for number in range(30)]}]
    (row,), _ = converted("visual-genome", content)
    assert len(row["regions"][0]) == 3
    (row,), _ = converted("visual-genome", content, max_regions=7)
    assert len(row["regions"][0]) == 7


def test_images_are_found_in_both_of_its_folders(converted):
    content = [{"image_id": 2, "regions": [region(5, "a dog")]}, {"regions": [region(6, "a cat") | {"image_id": 1}]}]
    rows, _ = converted("visual-genome", content)
    assert [row["image"] for row in rows] == ["VG_100K_2/2.jpg", "VG_100K/1.jpg"]


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (region(7, "  "), "is no text"),
        (region(7, "a dog", width=0), "has no area"),
        (region(7, "a dog", x="2"), "no x, y, width and height"),
        ("a dog", "is a str"),
    ],
)
def test_a_bad_region_is_left_out_alone(converted, bad, reason):
    (row,), (reject,) = converted("visual-genome", [{"id": 1, "regions": [region(5, "a red clock"), bad]}])
    assert [answer for _, answer in texts(row)] == ["a red clock"]
    assert reason in reject["reason"]


@pytest.mark.parametrize("entry", [5, {"id": 1}, {"id": 3, "regions": [region(5, "on no picture")]}])
def test_a_bad_entry_is_a_reject(converted, entry):
    rows, rejects = converted("visual-genome", [{"id": 1, "regions": [region(5, "a red clock")]}, entry])
    assert (len(rows), len(rejects)) == (1, 1)


def test_captions_with_masks_in_cocos_form_are_read_too(converted):
    content = {
        "images": [{"id": 1, "file_name": "VG_100K/1.jpg", "height": 40, "width": 60}],
        "annotations": [
            {"id": 1, "image_id": 1, "caption": "a red clock", "segmentation": SQUARE},
            {"id": 2, "image_id": 1, "caption": "not to be used", "segmentation": SQUARE, "ignore": True},
        ],
        "categories": [{"id": 1, "name": "object"}],
    }
    (row,), _ = converted("visual-genome", content)
    assert [answer for _, answer in texts(row)] == ["a red clock"]
    assert row["regions"] == [[{"polygon": SQUARE}]]
