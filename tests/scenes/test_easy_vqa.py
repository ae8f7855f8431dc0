import random
import sys

import pytest

from tokenpacker.scenes import EasyVqa, Question, easy_vqa


def test_a_missing_package_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(ModuleNotFoundError, match="pip install"):
        EasyVqa("test")


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="train or test"):
        EasyVqa("val")


@pytest.fixture(scope="module")
def official():
    pytest.importorskip("easy_vqa", reason="the easy-vqa package is not installed")
    return EasyVqa("train")


def test_the_official_split_has_its_published_size(official):
    num_questions = sum(len(questions) for _, _, questions in official._entries)
    assert (len(official), num_questions) == (4000, 38575)


def test_generated_questions_use_the_official_wordings_only(official):
    wordings = {question.text for index in range(len(official)) for question in official._entries[index][2]}
    assert wordings == set(easy_vqa.all_question_texts())
    asked = {question.text for seed in range(300) for question in easy_vqa.make_sample(seed).questions}
    assert asked <= wordings


def test_captions_agree_with_the_official_answers(official):
    for index in range(200):
        sample = official[index]
        for question in sample.questions:
            if question.kind in ("color", "shape"):
                assert question.answer in sample.caption


def test_what_is_known_is_deduced_from_answers():
    questions = (
        Question("is there not a red shape?", "no", "absence"),
        Question("is there a circle?", "no", "presence"),
    )
    assert easy_vqa.deduce(questions) == ("red", None)


@pytest.mark.parametrize("seed", range(50))
def test_look_alikes_are_answered_truthfully(seed):
    scene = easy_vqa.make_scene(random.Random(seed))
    item = scene.items[0]
    assert 0 <= item.box[0] < item.box[2] <= 64.5
    assert 0 <= item.box[1] < item.box[3] <= 64.5
    for question in easy_vqa.ask(scene, random.Random(seed), count=30):
        if question.kind == "color":
            assert question.answer == item.color
        elif question.kind == "shape":
            assert question.answer == item.text
        else:
            named = item.color in question.text.split() or item.text in question.text.rstrip("?").split()
            assert (question.answer == "yes") == (named != (question.kind == "absence"))
