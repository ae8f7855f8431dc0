import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.metrics.ocrbench import FORMULAS


def ask(number: int, kind: str, *references: str) -> BenchQuestion:
    return BenchQuestion(id=str(number), text="?", answers=references, extra={"category": kind})


@pytest.mark.parametrize(
    ("kind", "reference", "answer", "score"),
    [
        ("Regular Text Recognition", "CENTRE", "It says Centre.", 1),
        ("Regular Text Recognition", "two\nlines", "two lines", 1),
        ("Doc-oriented VQA", "$5", "＄５", 1),  # full width
        ("Doc-oriented VQA", "$5", "$ 5", 0),
        (FORMULAS, "x ^ 2", "x^2 + 1", 1),
        (FORMULAS, "X^2", "x^2", 0),  # a formula's case counts
    ],
)
def test_an_answer_that_contains_the_text_is_right(kind, reference, answer, score):
    assert METRICS["ocrbench"].score(answer, ask(1, kind, "never", reference)) == score


def test_the_score_is_of_a_thousand_and_of_five_parts():
    """3 of 5 right: 600 of 1,000; 1 of 2 in Text Recognition: 150 of 300."""
    questions = [
        ask(0, "Regular Text Recognition", "a"),
        ask(1, "Digit String Recognition", "1"),
        ask(2, "Scene Text-centric VQA", "b"),
        ask(3, "Key Information Extraction", "c"),
        ask(4, FORMULAS, "x"),
    ]
    rows = METRICS["ocrbench"].rows(questions, {"0": "a", "1": "2", "2": "b", "4": "x"})
    numbers = METRICS["ocrbench"].aggregate(rows)
    assert {name: value for name, value in numbers.items() if name.startswith("score")} == {
        "score": 600,
        "score/Text Recognition": 150,
        "score/Scene Text-centric VQA": 200,
        "score/Key Information Extraction": 0,
        f"score/{FORMULAS}": 100,
    }
    assert next(iter(numbers)) == "score"
