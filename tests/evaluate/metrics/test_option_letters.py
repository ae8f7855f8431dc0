import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.metrics.option_letters import option_letter, scienceqa_letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("b", "B"), (" B. ", "B"), ("(B)", "B"), ("B) a cat", "B"), ("B: a cat", "B"),
        ("A cat", ""), ("About three", ""), ("The answer is B", ""), ("?", ""),
    ],
)  # fmt: skip
def test_a_letter_must_stand_by_itself(answer, letter):
    assert option_letter(answer) == letter


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"), ("B. cat", "B"), ("B\ncat", "B"), ("So: The answer is C.", "C"), ("The answer is C", "C"),
        ("b", ""), ("B.cat", ""), ("F", ""), ("cat", ""),
    ],
)  # fmt: skip
def test_scienceqa_letters_are_read_as_llava_reads_them(answer, letter):
    assert scienceqa_letter(answer) == letter


def mmbench(number: int, letter: str, category: str) -> BenchQuestion:
    return BenchQuestion(id=str(number), text="?", answers=(letter,), extra={"category": category})


def test_mmbench_counts_a_question_that_is_right_in_every_rotation():
    """Question 7 is right in both rotations, 8 in one of two, 9 has a single form."""
    questions = [
        mmbench(7, "A", "logic"),
        mmbench(1_000_007, "B", "logic"),
        mmbench(8, "A", "logic"),
        mmbench(1_000_008, "B", "logic"),
        mmbench(9, "C", "colour"),
    ]
    said = {"7": "A", "1000007": "B.", "8": "A", "1000008": "A", "9": "(C)"}
    numbers = METRICS["mmbench"].aggregate(METRICS["mmbench"].rows(questions, said))
    assert next(iter(numbers)) == "accuracy"
    assert numbers == pytest.approx(
        {
            "accuracy": 100 * 2 / 3,
            "accuracy/colour": 100,
            "accuracy/logic": 50,
            "accuracy without rotations": 80,
            "rotations": 5 / 3,
        }
    )


def test_seed_is_split_by_question_type():
    questions = [
        BenchQuestion(id=str(place), text="?", answers=("B",), extra={"category": kind})
        for place, kind in enumerate(["Scene Understanding", "Instance Counting"])
    ]
    rows = METRICS["seed"].rows(questions, {"0": "B", "1": "C"})
    assert METRICS["seed"].aggregate(rows) == {
        "accuracy": 50,
        "accuracy/Instance Counting": 0,
        "accuracy/Scene Understanding": 100,
    }


def test_scienceqa_leads_with_the_questions_that_have_an_image():
    questions = [
        BenchQuestion(id="0", text="?", images=("a.png",), answers=("B",)),
        BenchQuestion(id="1", text="?", answers=("A",)),
    ]
    rows = METRICS["scienceqa"].rows(questions, {"0": "A", "1": "A"})
    assert METRICS["scienceqa"].aggregate(rows) == {"accuracy IMG": 0, "accuracy": 50}
