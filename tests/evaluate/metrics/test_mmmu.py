import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.metrics.mmmu import chosen_option

OPTIONS = ("red fox", "brown bear", "grey wolf")


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("(A) or rather (C)", "C"),  # the last one named
        ("I choose B here", "B"),
        ("C: grey wolf", ""),  # as the official code: neither in brackets nor before a space or a period
        ("It must be the animal grey wolf, surely", "C"),
        ("grey wolf", ""),  # too short to look for an option's text
        ("no idea", ""),
    ],
)
def test_an_option_is_read_from_brackets_then_letters_then_text(answer, letter):
    assert chosen_option(answer, OPTIONS) == letter


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("12", "12", 1),
        ("The answer is 12.0", "12", 1),
        ("x = 1,200", "1200", 1),
        ("1.204", "1.2", 1),  # two digits
        ("1.21", "1.2", 0),
        ("so it is a triangle", "Triangle", 1),
        ("a square", "Triangle", 0),
        ("xyz", "x", 0),  # one character must stand by itself
        ("it is x here", "x", 1),
    ],
)
def test_an_open_answer_is_compared_by_number_or_text(answer, reference, score):
    assert METRICS["mmmu"].score(answer, BenchQuestion(id="1", text="?", answers=(reference,))) == score


def test_mmmu_is_split_by_subject():
    questions = [
        BenchQuestion(id="0", text="?", answers=("B",), extra={"category": "Art", "options": OPTIONS}),
        BenchQuestion(id="1", text="?", answers=("7",), extra={"category": "Math"}),
    ]
    rows = METRICS["mmmu"].rows(questions, {"0": "B", "1": "8"})
    assert METRICS["mmmu"].aggregate(rows) == {"accuracy": 50, "accuracy/Art": 100, "accuracy/Math": 0}
