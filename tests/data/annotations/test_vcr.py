from __future__ import annotations

import json

import pytest

from region_rows import texts
from tokenpacker.data.annotations.wording import WHY

LINE = {
    "objects": ["person", "person", "car", "dog"],
    "img_fn": "film/still.jpg",
    "metadata_fn": "film/still.json",
    "annot_id": "train-0",
    "question": ["Why", "is", [1], "pointing", "at", [0, 2], "?"],
    "answer_choices": [["He", "does", "n't", "."], [[1], "'", "s", "late", ",", "so", "he", "runs", "."]],
    "answer_label": 1,
    "rationale_choices": [["The", "lights", "(", "of", [2], ")", "are", "on", "."], ["No"]],
    "rationale_label": 0,
}
SEGMS = [[[[2, 2], [20, 2], [20, 20]]], [[[30, 5], [40, 5], [35, 25]], [[1, 1], [2, 2]]], [], [[[1, 1], [2, 1]]]]
BOXES = [[2, 2, 20, 20, 0.9], [30, 5, 40, 25, 0.9], [4, 6, 50, 30, 0.8], [1, 1, 9, 9, 0.7]]


@pytest.fixture(autouse=True)
def still(images):
    (images("film/still.jpg") / "film/still.json").write_text(json.dumps({"boxes": BOXES, "segms": SEGMS, "width": 60}))


def read(converted, *lines, **options):
    return converted("vcr", "\n".join(json.dumps(line) for line in lines), name="train.jsonl", **options)


def test_objects_are_listed_then_asked_about_and_the_reason_is_asked_for(converted):
    (row,), rejects = read(converted, LINE)
    assert rejects == []
    (question, answer), (why, reason) = texts(row)
    assert "region 1 <mask>, region 2 <mask>, region 3 <mask> and region 4 <mask>" in question
    assert question.endswith("Why is region 2 pointing at region 1 and region 3?")
    assert answer == "region 2's late, so he runs."
    assert why in WHY
    assert reason == "The lights (of region 3) are on."


def test_a_region_is_its_objects_polygons_or_where_it_has_none_its_box(converted):
    (row,), _ = read(converted, LINE)
    assert row["regions"] == [
        [
            {"polygon": [[2, 2, 20, 2, 20, 20]]},
            {"polygon": [[30, 5, 40, 5, 35, 25]]},
            {"box": [4, 6, 50, 30]},
            {"box": [1, 1, 9, 9]},
        ]
    ]


def test_the_objects_that_are_spoken_of_are_never_left_out(converted):
    (row,), _ = read(converted, LINE, max_regions=3)
    assert len(row["regions"][0]) == 3
    assert texts(row)[0][0].endswith("Why is region 2 pointing at region 1 and region 3?")


def test_more_named_objects_than_regions_are_a_reject(converted):
    other = LINE | {"question": ["Why", "?"], "answer_choices": [["So", "."]], "answer_label": 0}
    rows, (reject,) = read(converted, LINE, other, max_regions=2)
    assert len(rows) == 1
    assert reject["kind"] == "too many regions"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"answer_label": None}, "use train.jsonl or val.jsonl"),
        ({"rationale_label": 9}, "rationale_label=9"),
        ({"question": ["Why", [9], "?"]}, "none of the 4 listed"),
        ({"question": "Why?"}, "no list of words"),
        ({"question": ["<mask>", "?"]}, "holds <mask>"),
        ({"objects": []}, "'objects'"),
        ({"objects": ["person"] * 5}, "4 boxes and 4 segms for 5 objects"),
        ({"metadata_fn": "film/none.json"}, "has no film/none.json"),
        ({"metadata_fn": "film/still.jpg"}, "no UTF-8 text"),
        ({"img_fn": "../still.jpg"}, "has no ../still.jpg"),
    ],
)
def test_a_bad_line_is_a_reject_with_its_reason(converted, bad, reason):
    rows, (reject,) = read(converted, LINE, LINE | {"annot_id": "bad"} | bad)
    assert len(rows) == 1
    assert reject["id"] == "bad"
    assert reason in reject["reason"]


def test_a_line_that_is_no_json_is_a_reject(converted):
    rows, (reject,) = converted("vcr", f"{json.dumps(LINE)}\n{{broken\n", name="train.jsonl")
    assert (len(rows), reject["id"]) == (1, "line 2")
