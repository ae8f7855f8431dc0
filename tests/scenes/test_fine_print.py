import itertools
import random

import pytest

from tokenpacker.scenes import FinePrint, fine_print
from tokenpacker.scenes.fine_print import FIRST_SEED, MAX_SIDE, MIN_SIDE, SPLIT_SIZE, make_page, make_scene
from tokenpacker.scenes.guessing import guess_accuracy
from tokenpacker.scenes.scene import COLORS, SHAPES, overlap


def test_a_sample_depends_on_split_and_index_alone():
    first, again = FinePrint("test")[3], FinePrint("test")[3]
    assert first.image.tobytes() == again.image.tobytes()
    assert first.questions == again.questions
    assert FinePrint("train")[3].scene != first.scene


def test_the_seeds_of_the_splits_do_not_meet():
    starts = sorted(FIRST_SEED.values())
    assert all(second - first >= SPLIT_SIZE for first, second in itertools.pairwise(starts))
    with pytest.raises(IndexError):
        FinePrint("train")[SPLIT_SIZE]


def test_an_unknown_split_names_the_valid_ones():
    with pytest.raises(ValueError, match="use one of train, test"):
        FinePrint("validation")


@pytest.mark.parametrize("index", range(40))
def test_everything_lies_inside_the_image_and_nothing_overlaps(index):
    scene = FinePrint("test")[index].scene
    assert MIN_SIDE <= min(scene.height, scene.width) <= max(scene.height, scene.width) <= MAX_SIDE
    boxes = [item.outer_box for item in scene.items]
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert 0 <= left < right <= scene.width
        assert 0 <= top < bottom <= scene.height
        assert not any(overlap((left, top, right, bottom), other) for other in boxes[:number])


@pytest.mark.parametrize("index", range(40))
def test_every_question_has_one_answer(index):
    scene, questions = FinePrint("test").truth(index)
    for kind in ("word", "number", "shape"):
        names = [item.text for item in scene.items if item.kind == kind]
        assert len(names) == len(set(names))
    frames = [item.frame for item in scene.items if item.frame]
    assert len(frames) == len(set(frames))
    answers = {question.text: question.answer for question in questions}
    assert all(answers[question.text] == question.answer for question in questions)


def test_a_question_about_a_box_is_answered_by_the_text_in_it():
    scene, questions = next(
        truth
        for index in range(100)
        for truth in [FinePrint("test").truth(index)]
        if any(question.kind == "number in box" for question in truth[1])
    )
    question = next(question for question in questions if question.kind == "number in box")
    (item,) = [item for item in scene.items if item.kind == "number" and f"{item.frame} box" in question.text]
    assert question.answer == item.text


def test_a_sample_asks_each_kind_of_question_at_most_once():
    kinds = [question.kind for question in FinePrint("test")[0].questions]
    assert len(kinds) == len(set(kinds))


def test_type_is_small_in_the_image_and_unreadable_in_one_tile_of_it():
    for index in range(30):
        scene = FinePrint("test").truth(index)[0]
        for item in scene.items:
            if item.kind != "shape":
                assert 7 <= item.font_size <= 26
                assert item.font_size * 96 / max(scene.height, scene.width) < 10


def test_crowded_scenes_hold_more():
    plain = sum(len(make_scene(random.Random(seed)).items) for seed in range(20))
    crowded = sum(len(make_scene(random.Random(seed), crowded=True).items) for seed in range(20))
    assert crowded > 1.5 * plain


def test_pages_are_full_of_text():
    page = make_page(random.Random(0), 96)
    assert len(page.items) >= 6
    assert {item.kind for item in page.items} == {"word", "number"}


def test_guessing_without_looking_stays_far_below_the_target():
    training = [question for index in range(300) for question in FinePrint("train")[index].questions]
    testing = [question for index in range(100) for question in FinePrint("test")[index].questions]
    right, asked = guess_accuracy(training, testing)
    assert right / asked < 0.35


def test_its_colors_and_shapes_are_among_those_the_encoder_is_taught():
    assert set(fine_print.FRAME_COLORS) <= set(COLORS)
    assert set(fine_print.SHAPES) <= set(SHAPES)
