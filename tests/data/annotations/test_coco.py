from __future__ import annotations

import copy

import pytest

from region_rows import SQUARE, TRIANGLE, texts

INSTANCES = {
    "info": {"year": 2017},
    "images": [{"id": 7, "file_name": "000000000007.jpg", "height": 40, "width": 60}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 18, "segmentation": SQUARE, "bbox": [2, 2, 18, 18], "iscrowd": 0},
        {"id": 2, "image_id": 7, "category_id": 3, "segmentation": TRIANGLE, "bbox": [30, 5, 10, 20], "iscrowd": 0},
        {
            "id": 3,
            "image_id": 7,
            "category_id": 3,
            "segmentation": {"counts": [0, 2400], "size": [40, 60]},
            "bbox": [0, 0, 60, 40],
            "iscrowd": 1,
        },
    ],
    "categories": [{"id": 18, "name": "dog"}, {"id": 3, "name": "car"}, {"id": 4, "name": "\ud83d"}],
}
FORMS = {"dog": [{"polygon": SQUARE}], "car": [{"polygon": TRIANGLE}, {"rle": {"counts": [0, 2400], "size": [40, 60]}}]}


@pytest.fixture(autouse=True)
def image(images):
    images("000000000007.jpg")


def test_each_region_is_named_by_its_category(converted):
    (row,), rejects = converted("coco", INSTANCES)
    assert (row["id"], row["image"]) == ("coco/image 7", "000000000007.jpg")
    assert rejects == []
    for (question, answer), region in zip(texts(row), row["regions"][0], strict=True):
        assert question.count("<mask>") == 1
        assert question.endswith("Answer with the name of the category alone.")
        assert region in FORMS[answer]


def test_at_most_so_many_regions_are_taken_and_the_seed_says_which(converted):
    def answers(seed):
        (row,), _ = converted("coco", INSTANCES, max_regions=2, seed=seed)
        assert len(row["regions"][0]) == 2
        return texts(row)

    assert answers(0) == answers(0)
    assert len({str(answers(seed)) for seed in range(8)}) > 1


def test_the_order_of_keys_in_the_file_does_not_matter(converted):
    backwards = dict(reversed(INSTANCES.items()))
    assert converted("coco", backwards) == converted("coco", INSTANCES)


def changed(**values):
    content = copy.deepcopy(INSTANCES)
    content["annotations"][0] |= values
    return content


@pytest.mark.parametrize(
    ("values", "kind", "reason"),
    [
        ({"category_id": 99}, "malformed row", "category_id=99"),
        ({"segmentation": [], "bbox": []}, "malformed region", "neither a polygon"),
        ({"segmentation": [[1, 2, 3]]}, "malformed region", "x and y in turn"),
        ({"segmentation": [["a", 2, 3, 4, 5, 6]]}, "malformed region", "x and y in turn"),
        ({"segmentation": {"counts": [0, 6], "size": [2, 3]}}, "malformed region", "2x3 in an image of 40x60"),
        ({"segmentation": {"size": [40, 60]}}, "malformed region", "'counts'"),
        ({"segmentation": "polygon"}, "malformed region", "is a str"),
        ({"segmentation": [], "bbox": [5, 5, 0, 3]}, "malformed region", "no area"),
        ({"image_id": 8}, "malformed row", "not listed in 'images'"),
        ({"category_id": 4}, "malformed row", "the category's name has U+D83D at character"),
    ],
)
def test_a_bad_annotation_is_left_out_alone_with_its_reason(converted, values, kind, reason):
    (row,), (reject,) = converted("coco", changed(**values))
    assert len(row["regions"][0]) == 2
    assert reject["kind"] == kind
    assert reason in reject["reason"]


def test_where_no_polygon_has_three_points_the_bounding_box_takes_its_place(converted):
    (row,), _ = converted("coco", changed(segmentation=[[2, 2, 20, 20]]))
    assert {"box": [2, 2, 20, 20]} in row["regions"][0]


def test_an_image_that_is_not_there_is_a_reject(converted):
    content = copy.deepcopy(INSTANCES)
    content["images"].append({"id": 8, "file_name": "nowhere.jpg", "height": 40, "width": 60})
    content["annotations"].append({"id": 4, "image_id": 8, "category_id": 3, "segmentation": SQUARE})
    (_,), (reject,) = converted("coco", content)
    assert (reject["id"], reject["kind"]) == ("image 8", "missing image")


@pytest.mark.parametrize("name", ["train2017/000000000007.jpg", "COCO_train2014_000000000007.jpg"])
def test_images_are_found_by_the_names_that_other_years_and_folders_give_them(converted, name):
    content = copy.deepcopy(INSTANCES)
    content["images"][0]["file_name"] = name
    (row,), _ = converted("coco", content)
    assert row["image"] == "000000000007.jpg"


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/hostname", ""])
def test_no_path_leads_out_of_the_folder_of_images(converted, tmp_path, image_of, name):
    image_of(40, 60).save(tmp_path / "secret.jpg")
    content = copy.deepcopy(INSTANCES)
    content["images"][0]["file_name"] = name
    with pytest.raises(ValueError, match=r"gives no row as coco.*check --images"):
        converted("coco", content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": [{"id": 1}], "annotations": []}, "no list 'annotations'"),
        ([{"id": 1}], "no list 'images'"),
        ({"images": [5], "annotations": []}, "an entry of 'images' is a int"),
        ('{"images": [{"id": 1}, ]}', "comma stands before the end"),
        ('{"images": [{"id": 1}', "is missing"),
        ("nothing", "a list or an object is due"),
    ],
)
def test_a_file_of_another_form_is_refused_as_a_whole(converted, content, message):
    with pytest.raises(ValueError, match=message):
        converted("coco", content)
