"""Marked objects: masks that are those of the drawing, and questions that only the masks answer."""

import itertools
import random

import numpy as np
import pytest

from tokenpacker.scenes import Regions, fine_print
from tokenpacker.scenes.guessing import guess_accuracy
from tokenpacker.scenes.marked_objects import (
    FIRST_SEED,
    MASK,
    MOST_REGIONS,
    ROUGH_REACH,
    grown,
    is_one_tile,
    mark,
    shuffled,
)
from tokenpacker.scenes.scene import ink


def test_a_sample_depends_on_split_and_index_alone():
    first, again = Regions("test", "rough")[3], Regions("test", "rough")[3]
    assert first.image.tobytes() == again.image.tobytes()
    assert first.questions == again.questions
    assert all((one == other).all() for one, other in zip(first.regions, again.regions, strict=True))
    assert Regions("train")[3].scene != first.scene


def test_the_seeds_of_the_splits_meet_neither_one_another_nor_those_of_fine_print():
    starts = sorted([*FIRST_SEED.values(), *fine_print.FIRST_SEED.values()])
    assert all(second - first >= fine_print.SPLIT_SIZE for first, second in itertools.pairwise(starts))
    with pytest.raises(IndexError):
        Regions("train")[fine_print.SPLIT_SIZE]


def test_unknown_splits_and_forms_name_the_valid_ones():
    with pytest.raises(ValueError, match="split='val' is unknown; use one of train, test"):
        Regions("val")
    with pytest.raises(ValueError, match="form='circle' is unknown; use one of mask, rough, box"):
        Regions("test", "circle")


@pytest.mark.parametrize("index", range(30))
def test_a_mask_holds_the_pixels_that_its_object_is_drawn_on_and_no_others(index):
    sample = Regions("test")[index]
    pixels = np.asarray(sample.image).astype(int)
    background = np.array(sample.scene.background)
    anywhere = np.zeros(pixels.shape[:2], dtype=bool)
    for item, mask in zip(sample.scene.items, sample.regions, strict=True):
        own, paper = np.abs(pixels - item.rgb).sum(-1), np.abs(pixels - background).sum(-1)
        assert mask.shape == (sample.scene.height, sample.scene.width)
        assert mask.sum() >= 10
        assert (own[mask] <= paper[mask] + 3).all()  # at most half of a pixel is paper; colours are rounded
        left, top, right, bottom = (round(edge) for edge in item.box)
        inside = np.s_[max(0, top - 1) : bottom + 1, max(0, left - 1) : right + 1]
        assert mask[inside].sum() == mask.sum()
        assert not ((own == 0) & ~mask)[inside].any()  # wholly of its colour, and not marked
        assert not (anywhere & mask).any()
        anywhere |= mask


def test_a_grown_mask_reaches_so_many_pixels_farther_in_every_direction():
    mask = np.zeros((9, 12), dtype=bool)
    mask[4, 0] = mask[7, 8] = True
    expected = np.zeros_like(mask)
    for row, col in np.argwhere(mask):
        expected[max(0, row - 2) : row + 3, max(0, col - 2) : col + 3] = True
    assert (grown(mask, 2) == expected).all()


@pytest.mark.parametrize("index", range(10))
def test_rough_masks_and_boxes_hold_the_whole_object_and_little_more(index):
    scene, _ = Regions("test").truth(index)
    rng = random.Random(index)
    for item in scene.items:
        rough, exact = mark(scene, item, "rough", rng), ink(scene, item)
        assert (rough | ~exact).all()
        assert not (rough & ~grown(exact, ROUGH_REACH)).any()
        for edge, tight in zip(mark(scene, item, "box", rng), item.box, strict=True):
            assert abs(edge - tight) <= ROUGH_REACH
        left, top, right, bottom = mark(scene, item, "box", rng)
        assert 0 <= left < right <= scene.width
        assert 0 <= top < bottom <= scene.height


def truth(question, items):
    """The answer, by the rules as a reader would put them."""
    first, last = items[0], items[-1]
    return {
        "color": lambda: first.color,
        "shape": lambda: first.text,
        "word": lambda: first.text,
        "number": lambda: first.text,
        "name": lambda: f"the {first.color} {'' if first.kind == 'shape' else first.kind + ' '}{first.text}",
        "box": lambda: first.frame,
        "colors": lambda: ", ".join(item.color for item in items),
        "same color": lambda: "yes" if first.color == last.color else "no",
        "left": lambda: "yes" if first.box[2] <= last.box[0] else "no",
        "above": lambda: "yes" if first.box[3] <= last.box[1] else "no",
    }[question.kind]()


@pytest.mark.parametrize("index", range(60))
def test_every_question_has_its_answer_from_the_objects_that_it_points_at(index):
    scene, questions = Regions("test").truth(index)
    assert len(scene.items) >= 2
    for question in questions:
        items = [scene.items[place] for place in question.regions]
        assert question.text.count(MASK) == len(items) == len(set(question.regions)) <= MOST_REGIONS
        assert question.answer == truth(question, items)
        if question.kind in ("shape", "word", "number"):
            assert items[0].kind == question.kind


def test_places_are_compared_only_in_pictures_of_one_tile_and_only_where_they_are_clear():
    asked = 0
    for index in range(80):
        scene, questions = Regions("test").truth(index)
        for question in questions:
            if question.kind in ("left", "above"):
                axis = 0 if question.kind == "left" else 1
                one, other = (scene.items[place].box for place in question.regions)
                assert is_one_tile(scene)
                assert one[axis + 2] <= other[axis] or other[axis + 2] <= one[axis]
                asked += 1
    assert asked > 40


@pytest.fixture(scope="module")
def questions():
    """Of 400 training and 400 test pictures."""
    return {
        split: [question for index in range(400) for question in Regions(split).truth(index)[1]]
        for split in ("train", "test")
    }


@pytest.mark.parametrize("kind", ["same color", "left", "above"])
def test_yes_and_no_are_equally_likely(questions, kind):
    answers = [question.answer for split in questions.values() for question in split if question.kind == kind]
    spread = 4 * (0.25 / len(answers)) ** 0.5  # four standard deviations of a fair coin
    assert abs(answers.count("yes") / len(answers) - 0.5) < spread


def test_guessing_from_the_question_alone_stays_far_below_the_target(questions):
    right, asked = guess_accuracy(questions["train"], questions["test"])
    assert right / asked < 0.25


def test_knowing_the_picture_but_not_the_marks_is_of_little_use():
    right = asked = 0
    for index in range(200):
        sample = Regions("test", "box")[index]
        exchanged = shuffled(sample, random.Random(index))
        assert not set(enumerate(exchanged.regions)) & set(enumerate(sample.regions))
        for question in sample.questions:
            regions = [exchanged.regions[place] for place in question.regions]
            items = [sample.scene.items[sample.regions.index(region)] for region in regions]
            fits = question.kind not in ("shape", "word", "number") or items[0].kind == question.kind
            right += fits and truth(question, items) == question.answer
            asked += 1
    assert right / asked < 0.2
