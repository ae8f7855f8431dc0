import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.layouts.loaded import broken_question
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.metrics.yes_or_no import said_in_mme, said_in_pope


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("No, there is none.", "no"),
        ("There is not a dog. Yes", "no"),
        ("Yes. There is no cat.", "yes"),  # only the first sentence counts
        ("NO", "yes"),  # as LLaVA reads it
        ("maybe", "yes"),
        ("nothing", "yes"),
        ("", ""),
        (None, ""),
    ],
)
def test_pope_answers_are_read_as_llava_reads_them(answer, said):
    assert said_in_pope(answer) == said


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes.", "yes"), ("n", "no"), ("Y", "yes"), ("No, it", "no"), ("not", "no"), ("It is no", ""), ("x", "")],
)
def test_mme_answers_are_read_from_the_first_four_characters(answer, said):
    assert said_in_mme(answer) == said


def pope(number: int, reference: str, split: str) -> BenchQuestion:
    return BenchQuestion(id=str(number), text="?", answers=(reference,), extra={"category": split})


def test_pope_is_the_mean_of_f1_over_its_splits():
    """random: 2 hits, 1 false alarm, 1 right no: precision 2/3, recall 1, F1 0.8.
    popular: 1 hit, 1 unanswered yes, 2 right noes: precision 1, recall 1/2, F1 2/3."""
    questions = [
        *(pope(place, reference, "random") for place, reference in enumerate(["yes", "yes", "no", "no"])),
        *(pope(place, reference, "popular") for place, reference in enumerate(["yes", "yes", "no", "no"], start=4)),
    ]
    said = dict(zip("01234567", ["Yes", "Yes", "Yes", "No", "Yes", None, "No", "No"], strict=True))
    numbers = METRICS["pope"].aggregate(METRICS["pope"].rows(questions, said))
    assert next(iter(numbers)) == "f1"
    assert numbers == pytest.approx(
        {
            "f1": 100 * (0.8 + 2 / 3) / 2,
            "accuracy": 75,
            "precision": 100 * (2 / 3 + 1) / 2,
            "recall": 75,
            "yes ratio": 50,
            "f1/random": 80,
            "accuracy/random": 75,
            "precision/random": 200 / 3,
            "recall/random": 100,
            "yes ratio/random": 75,
            "f1/popular": 200 / 3,
            "accuracy/popular": 75,
            "precision/popular": 100,
            "recall/popular": 50,
            "yes ratio/popular": 25,
            "f1 of all together": 75,  # 3 hits, 4 said, 4 are
        }
    )


def test_always_no_has_no_precision_and_does_not_fail():
    rows = METRICS["pope"].rows([pope(0, "yes", "random"), pope(1, "no", "random")], {"0": "no", "1": "no"})
    numbers = METRICS["pope"].aggregate(rows)
    assert (numbers["f1"], numbers["precision"], numbers["accuracy"]) == (0, 0, 50)


def mme(number: int, category: str, image: str, reference: str) -> BenchQuestion:
    return BenchQuestion(id=str(number), text="?", answers=(reference,), extra={"category": category, "group": image})


def test_mme_adds_accuracy_and_the_share_of_images_with_both_right():
    """count: 3 of 4 right, 1 of 2 images: 75 + 50. OCR: both right: 200. code_reasoning: 1 of 2, no image: 50."""
    questions = [
        mme(0, "count", "a.png", "Yes"),
        mme(1, "count", "a.png", "No"),
        mme(2, "count", "b.png", "Yes"),
        mme(3, "count", "b.png", "No"),
        mme(4, "OCR", "a.png", "Yes"),
        mme(5, "OCR", "a.png", "No"),
        mme(6, "code_reasoning", "c.png", "Yes"),
        mme(7, "code_reasoning", "c.png", "No"),
    ]
    said = {"0": "yes", "1": "no", "2": "Yes.", "3": "yes", "4": "y", "5": "No", "6": "yes"}
    numbers = METRICS["mme"].aggregate(METRICS["mme"].rows(questions, said))
    assert list(numbers)[:3] == ["perception", "cognition", "total"]
    assert (numbers["perception"], numbers["cognition"], numbers["total"]) == (325, 50, 375)
    assert (numbers["points/count"], numbers["accuracy/count"], numbers["accuracy+/count"]) == (125, 75, 50)


def test_an_mme_question_needs_the_name_of_its_pair():
    with pytest.raises(ValueError, match="has category 'count' and group None; give the image's name as group"):
        METRICS["mme"].check(BenchQuestion(id="1", text="?", answers=("yes",), extra={"category": "count"}))


def test_a_line_that_is_no_question_makes_no_split_of_its_own():
    """2 of 2 right in either split, and half of the broken line in each: 2 of 2.5."""
    asked = [pope(number, "yes", split) for number, split in enumerate(["random", "random", "popular", "popular"])]
    broken, _ = broken_question("file.json, line 5", "no JSON")
    metric = METRICS["pope"]
    numbers = metric.aggregate(metric.rows([*asked, broken], {str(number): "yes" for number in range(4)}))
    assert numbers["accuracy"] == numbers["accuracy/random"] == numbers["accuracy/popular"] == 80
    assert not any("no split" in name for name in numbers)
