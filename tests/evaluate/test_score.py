"""Counting: exact match, accuracy and its interval."""

import json

import pytest

from tokenpacker.evaluate import Answer, Score, TaskResult, normalize_answer


def answered(answer: str, truth: str) -> Answer:
    return Answer(image="image-1", question="what number?", kind="number", answer=answer, truth=truth)


def test_an_answer_counts_when_it_equals_the_truth_up_to_case_and_outer_space():
    assert answered(" Circle\n", "circle").is_correct
    assert not answered("circle.", "circle").is_correct
    assert not answered("a circle", "circle").is_correct
    assert not answered("", "circle").is_correct
    assert normalize_answer("  YES ") == "yes"


def test_a_score_counts_right_answers():
    score = Score.of([answered("4", "4"), answered("5", "4"), answered("4", "4"), answered("4", "4")])
    assert (score.num_questions, score.num_correct, score.accuracy) == (4, 3, 0.75)


@pytest.mark.parametrize(
    ("num_questions", "num_correct", "low", "high"),
    [
        (10, 0, 0.0, 0.2775),  # Brown, Cai and DasGupta 2001: the interval does not collapse at 0 of n
        (10, 10, 0.7225, 1.0),
        (263, 81, 0.2553, 0.3662),  # Newcombe 1998, example (a), method 3
    ],
)
def test_the_interval_is_wilsons(num_questions, num_correct, low, high):
    assert Score(num_questions, num_correct).interval == pytest.approx((low, high), abs=5e-5)


def test_no_questions_leave_everything_open():
    assert Score(0, 0).accuracy == 0.0
    assert Score(0, 0).interval == (0.0, 1.0)


def test_a_result_becomes_one_json_object():
    result = TaskResult(
        task="easy-vqa",
        scale_factor=2,
        max_image_tokens=None,
        score=Score(4, 3),
        kinds={"number": Score(4, 3)},
        num_images=2,
        image_tokens=37.0,
        seconds=0.5,
        errors=(answered("5", "4"),),
    )
    values = json.loads(json.dumps(result.to_dict()))
    assert values["accuracy"] == values["kinds"]["number"]["accuracy"] == 0.75
    assert values["milliseconds_per_question"] == 125.0
    assert values["errors"][0]["truth"] == "4"
