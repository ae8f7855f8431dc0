import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS


def score(name: str, answer: str, *references: str) -> float:
    if package := METRICS[name].package:
        pytest.importorskip(package, reason=f"{package} is not installed; it is in the extra evaluate")
    return METRICS[name].score(answer, BenchQuestion(id="1", text="?", answers=references))


def test_exact_ignores_case_and_spacing_only():
    assert score("exact", " Red  Bus ", "blue", "red bus") == 1
    assert score("exact", "red bus.", "red bus") == 0


def test_contains_finds_a_reference_anywhere():
    assert score("contains", "It is a Red\nbus.", "red bus") == 1
    assert score("contains", "red", "red bus") == 0


@pytest.mark.parametrize(
    ("answer", "references", "wanted"),
    [
        ("STOP", ("stop",), 1),
        ("stap", ("stop",), 1 - 1 / 4),
        ("shop now", ("stop now", "x"), 1 - 1 / 8),
        ("stxx", ("stop",), 0),  # distance 2 of 4 is not below 0.5
        ("a  b", ("A B",), 1),
        ("something else", ("stop",), 0),
    ],
)
def test_anls_is_the_similarity_to_the_closest_reference(answer, references, wanted):
    assert score("anls", answer, *references) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("105", "100", 1),  # 5 % off
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("-100", "100", 0),
        ("5%", "0.05", 1),
        ("5", "5%", 0),  # 5 and 0.05
        ("0", "0", 1),
        ("0.0", "0", 0),  # of 0 there are no 5 %, so texts are compared
        ("France", "france", 1),
        ("French", "France", 0),
        ("nan", "5", 0),
        ("inf", "5", 0),
    ],
)
def test_relaxed_accuracy_lets_numbers_be_5_percent_off(answer, reference, wanted):
    assert score("relaxed", answer, reference) == wanted


def test_chartqa_is_split_into_human_and_augmented():
    questions = [
        BenchQuestion(id=str(place), text="?", answers=("10",), extra={"category": category})
        for place, category in enumerate(["human", "human", "augmented", "augmented"])
    ]
    rows = METRICS["relaxed"].rows(questions, {"0": "10", "1": "12", "2": "10.4"})
    assert METRICS["relaxed"].aggregate(rows) == {"accuracy": 50, "accuracy/augmented": 50, "accuracy/human": 50}


def test_gqa_drops_a_final_period():
    assert score("gqa", "Red.", "red") == 1
    assert score("gqa", "the red", "red") == 0
