import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.metrics.vqa import agreement, normalize_m4c, normalize_vqa


def by_people(**given: int) -> BenchQuestion:
    answers = [answer for answer, count in given.items() for _ in range(count)]
    return BenchQuestion(id="1", text="?", answers=tuple(answers), extra={"category": "other"})


def test_four_of_ten_people_make_an_answer_right():
    """Without one of the four, 3 others are left: 3/3. Without one of the six: 4/3, at most 1."""
    assert METRICS["vqa"].score("red", by_people(red=4, blue=6)) == 1


@pytest.mark.parametrize(
    ("people", "score"),
    [
        (3, (3 * 2 / 3 + 7 * 1) / 10),  # without one of the three 2 are left, without one of the others all 3
        (2, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        (1, (1 * 0 + 9 * 1 / 3) / 10),
        (0, 0),
    ],
)
def test_fewer_people_count_a_third_each_with_each_left_out_once(people, score):
    assert METRICS["vqa"].score("red", by_people(red=people, blue=10 - people)) == pytest.approx(score)


def test_three_people_of_ten_give_nine_tenths():
    assert agreement(3, 10) == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("Two", "2"),
        ("None", "0"),
        ("ten dogs", "10 dogs"),
        ("The red bus", "red bus"),
        ("an apple", "apple"),
        ("dont", "don't"),
        ("yall'dve know", "yall'dve know"),
        ("y'alld've know", "y'all'd've know"),
        ("oclock", "o'clock"),
        ("wont", "won't"),
        ("t-shirt", "t shirt"),
        ("red - blue", "red blue"),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),
        ("3.5", "3.5"),
        ("st. john", "st john"),
        ("yes.", "yes"),
        ("yes!", "yes"),
        ("left\nright", "left right"),
        ("it's", "it's"),
    ],
)
def test_an_answer_is_normalised_as_in_the_official_code(given, wanted):
    assert normalize_vqa(given) == wanted


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("Nike's", "nike 's"), ("1,000", "1000"), ("red, blue", "red blue"), ("really?", "really"), ("A Dog", "dog")],
)
def test_m4c_splits_an_s_off_and_drops_commas_first(given, wanted):
    assert normalize_m4c(given) == wanted


def test_commas_are_what_textvqa_and_vqav2_differ_in():
    """VQA v2 makes a comma without a space a space: `a,b` becomes `a b`; `a` is then an article."""
    assert (normalize_vqa("red,blue"), normalize_m4c("red,blue")) == ("red blue", "redblue")


def test_answer_types_are_shares_of_their_own():
    yes = BenchQuestion(id="2", text="?", answers=("yes",) * 10, extra={"category": "yes/no"})
    rows = METRICS["vqa"].rows([by_people(red=3, blue=7), yes], {"1": "Red", "2": "no"})
    assert METRICS["vqa"].aggregate(rows) == pytest.approx({"accuracy": 45, "accuracy/other": 90, "accuracy/yes/no": 0})


def test_a_single_reference_is_refused_as_it_could_never_be_right():
    with pytest.raises(ValueError, match="has 1 reference answers, and vqa cannot be 1 with fewer than 4"):
        METRICS["vqa"].score("red", BenchQuestion(id="1", text="?", answers=("red",)))
