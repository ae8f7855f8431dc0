from __future__ import annotations

import pytest

from region_rows import SQUARE, TRIANGLE, texts


def entry(*messages, **values):
    roles = ("human", "gpt")
    return {
        "id": 7,
        "file_name": "COCO_train2014_000000000007.jpg",
        "height": 40,
        "width": 60,
        "annotation": [{"segmentation": SQUARE, "bbox": [2, 2, 18, 18]}, {"segmentation": TRIANGLE}],
        "conversations": [{"from": roles[n % 2], "value": text} for n, text in enumerate(messages)],
        **values,
    }


TALK = entry("What is <region1> doing?", "It eats <region2>.", "Is <region2> round?", "No.")
BOTH = [{"polygon": SQUARE}, {"polygon": TRIANGLE}]


@pytest.fixture(autouse=True)
def image(images):
    images("000000000007.jpg")


@pytest.mark.parametrize("format", ["osprey-conversation", "osprey-short", "osprey-part"])
def test_regions_are_listed_once_and_then_called_by_their_numbers(converted, format):
    (row,), rejects = converted(format, [TALK])
    assert rejects == []
    (first, eats), (second, no) = texts(row)
    assert "region 1 <mask> and region 2 <mask>" in first
    assert "What is region 1 doing?" in first
    assert "Is region 2 round?" in second
    assert (eats, no) == ("It eats region 2.", "No.")
    assert row["regions"] == [BOTH]
    assert row["image"] == "000000000007.jpg"


def test_the_families_of_short_answers_ask_for_them_every_time(converted):
    for format, short in (("osprey-short", True), ("osprey-part", True), ("osprey-conversation", False)):
        (row,), _ = converted(format, [TALK])
        asked = [question.endswith("Answer with a single word or a short phrase.") for question, _ in texts(row)]
        assert asked == [short, short]


def test_in_positive_and_negative_questions_the_mark_stands_where_the_region_is_named(converted):
    talk = entry("Is <region2> a cat?", "No.", "Is <region1> a dog near <region2>?", "Yes, <region1> is.")
    (row,), _ = converted("osprey-posneg", [talk])
    assert texts(row) == [("Is <mask> a cat?", "No."), ("Is <mask> a dog near <mask>?", "Yes, region 1 is.")]
    assert row["regions"] == [[BOTH[1], BOTH[0], BOTH[1]]]


def test_detailed_descriptions_are_asked_for_region_by_region(converted):
    told = entry(description=["<region1>: A dog,\nseen from the side.", "<region2>: The bowl of <region1>."])
    (row,), _ = converted("osprey-detail", [told])
    found = {answer: region for (_, answer), region in zip(texts(row), row["regions"][0], strict=True)}
    assert found == {"A dog, seen from the side.": BOTH[0], "The bowl of region 1.": BOTH[1]}
    assert all(question.count("<mask>") == 1 for question, _ in texts(row))
    (row,), _ = converted("osprey-detail", [told], max_regions=1)
    assert len(row["regions"][0]) == 1


def test_a_question_without_its_answer_is_left_out(converted):
    (row,), _ = converted("osprey-conversation", [entry("What is <region1>?", "A dog.", "And <region2>?")])
    assert len(texts(row)) == 1


@pytest.mark.parametrize(
    ("format", "bad", "kind", "reason"),
    [
        ("osprey-short", entry("What is <region3>?", "It."), "regions and marks differ", "region 3 of 2"),
        ("osprey-posneg", entry("What is <region0>?", "It."), "regions and marks differ", "region 0 of 2"),
        ("osprey-posneg", entry("What is this?", "It.", annotation=[]), "malformed region", "no regions"),
        ("osprey-short", entry(), "malformed conversation", "at least one message"),
        ("osprey-short", entry("What?", ""), "malformed row", "is no text"),
        ("osprey-short", entry("What is <image>?", "It."), "malformed row", "holds <image>"),
        ("osprey-short", entry("What?", "It.", annotation=[{}]), "malformed region", "neither a polygon"),
        ("osprey-short", entry("What?", "It.", file_name="no.jpg"), "missing image", "no.jpg"),
        ("osprey-short", entry("What?", "It.", annotation={}), "malformed row", "no list 'annotation'"),
        ("osprey-detail", entry(description=["A dog."]), "malformed row", "does not begin with one"),
        ("osprey-detail", entry(description=["<region5>: A dog."]), "malformed row", "does not begin with one"),
        ("osprey-detail", entry(), "malformed row", "no list 'description'"),
    ],
)
def test_a_bad_entry_is_a_reject_with_its_reason(converted, format, bad, kind, reason):
    good = TALK | {"description": ["<region1>: A dog."]}
    rows, (reject,) = converted(format, [good, bad])
    assert len(rows) == 1
    assert reject["id"].startswith("entry 2")
    assert reject["kind"] == kind
    assert reason in reject["reason"]


def test_an_entry_with_too_many_regions_is_a_reject_for_its_texts_name_them_all(converted):
    many = entry("What is <region1>?", "A dog.", annotation=[{"segmentation": SQUARE}] * 3)
    rows, (reject,) = converted("osprey-conversation", [TALK, many], max_regions=2)
    assert len(rows) == 1
    assert reject["kind"] == "too many regions"
