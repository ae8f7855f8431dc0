from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from region_rows import SQUARE, TRIANGLE, texts

DOCUMENT = Path(__file__).parents[3] / "docs" / "regions-data.md"
INSTANCES = {
    "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "height": 40, "width": 60}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 1, "segmentation": SQUARE},
        {"id": 2, "image_id": 7, "category_id": 1, "segmentation": TRIANGLE},
    ],
    "categories": [{"id": 1, "name": "person"}],
}


def ref(ref_id, ann_id, *sentences, split="train", image_id=7):
    sentences = [{"sent": sentence, "tokens": sentence.split()} for sentence in sentences]
    return {"ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "sentences": sentences}


REFS = [ref(1, 1, "left man", "man in blue"), ref(2, 2, "woman"), ref(3, 1, "unseen", split="testA")]


class Trap:
    """Makes a file when it is read from a pickle."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.fixture(autouse=True)
def image(images, tmp_path):
    images("000000000007.jpg")
    (tmp_path / "instances.json").write_text(json.dumps(INSTANCES))


def test_refs_are_joined_with_their_masks(converted):
    (row,), rejects = converted("refcoco", REFS)
    assert rejects == []
    found = {answer: region["polygon"] for (_, answer), region in zip(texts(row), row["regions"][0], strict=True)}
    assert found.pop("woman") == TRIANGLE
    ((answer, polygon),) = found.items()
    assert answer in ("left man", "man in blue")
    assert polygon == SQUARE


def test_of_several_expressions_the_seed_takes_one(converted):
    def answers(seed):
        (row,), _ = converted("refcoco", REFS, seed=seed)
        return {answer for _, answer in texts(row)} - {"woman"}

    assert set.union(*(answers(seed) for seed in range(8))) == {"left man", "man in blue"}


def test_refcoco_plus_asks_for_looks_and_not_for_places(converted):
    (row,), _ = converted("refcoco+", REFS)
    assert all("not where it is" in question for question, _ in texts(row))
    (row,), _ = converted("refcoco", REFS)
    assert not any("not where it is" in question for question, _ in texts(row))


def test_another_split_can_be_taken(converted):
    (row,), _ = converted("refcoco", REFS, split="testA")
    assert [answer for _, answer in texts(row)] == ["unseen"]
    with pytest.raises(ValueError, match=r"split='val' but testA, train"):
        converted("refcoco", REFS, split="val")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (ref(4, 99, "nobody"), "ann_id=99"),
        (ref(4, 1), "no 'sentences'"),
        (ref(4, 1, "<mask>"), "holds <mask>"),
        (ref(4, 1, "nobody", image_id=8), "image_id=8 is not listed"),
    ],
)
def test_a_bad_ref_is_left_out_with_its_reason(converted, bad, reason):
    (row,), (reject,) = converted("refcoco", [*REFS, bad])
    assert len(row["regions"][0]) == 2
    assert reason in reject["reason"]


def test_captions_in_cocos_form_are_joined_by_picture(converted):
    name = "COCO_train2014_000000000007.jpg"
    content = {
        "images": [
            {"id": number, "file_name": name, "height": 40, "width": 60, "caption": caption}
            for number, caption in enumerate(("left man", "woman"))
        ],
        "annotations": [
            {"id": number, "image_id": number, "category_id": 1, "segmentation": shape}
            for number, shape in enumerate((SQUARE, TRIANGLE))
        ],
        "categories": INSTANCES["categories"],
    }
    (row,), _ = converted("refcoco", content)
    pairs = {answer: region for (_, answer), region in zip(texts(row), row["regions"][0], strict=True)}
    assert pairs == {"left man": {"polygon": SQUARE}, "woman": {"polygon": TRIANGLE}}


def test_a_pickle_is_refused_unread(converted, tmp_path):
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    with pytest.raises(ValueError, match=r"is a pickle.*make JSON of it once, as docs/regions-data\.md"):
        converted("refcoco", None, name="refs(unc).p")
    assert not (tmp_path / "sprung").exists()


def test_refs_without_cocos_file_name_the_remedy(converted, tmp_path):
    (tmp_path / "instances.json").unlink()
    with pytest.raises(ValueError, match="--instances"):
        converted("refcoco", REFS)


def test_the_documented_way_makes_json_of_a_pickle_and_runs_nothing(converted, tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "plain.py").write_text(script)

    def run(content):
        (tmp_path / "refs(unc).p").write_bytes(content)
        command = [sys.executable, "plain.py", "refs(unc).p", "refs.json"]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert run(pickle.dumps(REFS, protocol=2)).returncode == 0
    (row,), _ = converted("refcoco", None, name="refs.json")
    assert len(row["regions"][0]) == 2
    refused = run(pickle.dumps(Trap(str(tmp_path / "sprung"))))
    assert "has no place in refs" in refused.stderr
    assert not (tmp_path / "sprung").exists()
