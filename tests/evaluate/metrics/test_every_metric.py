import doctest
import random
import subprocess
import sys

import pytest

import tokenpacker.evaluate.metrics
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.layouts.loaded import broken_question
from tokenpacker.evaluate.metrics import METRICS, find_metric

REFERENCES = {
    "vqa": ("red",) * 10,
    "textvqa": ("red",) * 10,
    "vizwiz": ("red",) * 10,
    "iou": ("[0, 0, 1, 1]",),
    "pope": ("yes",),
    "mme": ("yes",),
    "mmbench": ("B",),
    "seed": ("B",),
    "scienceqa": ("B",),
    "mmmu": ("B",),
}
CATEGORY = {"mme": "count", "pope": "random"}
PER_QUESTION = sorted(set(METRICS) - {"refcoco", "mm-vet"})
BROKEN = [None, "", "  \n", 7, b"red", ["red"], "x" * 1_000_000, "\ud800", "💥" * 50, "\0", "(", "[", "1e999%"]


def question_for(name: str, number: int = 0) -> BenchQuestion:
    extra = {"category": CATEGORY.get(name, "a"), "group": f"g{number // 2}"}
    if name == "mmmu":
        extra["options"] = ["cat", "dog"]
    return BenchQuestion(
        id=str(number), text="?", images=(f"{number // 2}.png",), answers=REFERENCES.get(name, ("red",)), extra=extra
    )


def right_answer(name: str) -> str:
    return question_for(name).answers[0]


def need(name: str) -> None:
    if package := METRICS[name].package:
        pytest.importorskip(package, reason=f"{package} is not installed; it is in the extra evaluate")


@pytest.mark.parametrize("name", PER_QUESTION)
def test_a_reference_itself_scores_one(name):
    need(name)
    assert METRICS[name].score(right_answer(name), question_for(name)) == 1


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: repr(broken)[:12])
@pytest.mark.parametrize("name", sorted(set(PER_QUESTION) - {"pope"}))
def test_a_broken_answer_scores_zero(name, broken):
    need(name)
    assert METRICS[name].score(broken, question_for(name)) == 0


@pytest.mark.parametrize("broken", BROKEN[:7], ids=lambda broken: repr(broken)[:12])
def test_a_broken_answer_to_pope_is_neither_yes_nor_no(broken):
    metric = METRICS["pope"]
    no = BenchQuestion(id="1", text="?", answers=("no",))
    assert metric.score(broken, question_for("pope")) == metric.score(broken, no) == 0
    assert metric.aggregate(metric.rows([no], {"1": broken}))["yes ratio"] == 0


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"mm-vet"}))
def test_lines_that_are_no_questions_stay_in_the_denominator(name):
    need(name)
    metric, asked = METRICS[name], [question_for(name, number) for number in range(4)]
    broken = [broken_question(f"file.json, line {number}", "no JSON")[0] for number in range(4)]
    answers = {question.id: right_answer(name) for question in asked}
    whole, mixed = metric.rows(asked, answers), metric.rows(asked + broken, answers)
    assert [(row.answer, row.score) for row in mixed[4:]] == [(None, 0)] * 4
    if name != "refcoco":  # CIDEr is 0 where all references are the same
        headline = "accuracy" if name == "pope" else next(iter(metric.aggregate(whole)))
        best, lower = (metric.aggregate(rows)[headline] for rows in (whole, mixed))
        assert 0 < lower < best


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"mm-vet"}))
def test_a_question_without_an_answer_stays_in_the_denominator(name):
    need(name)
    metric, questions = METRICS[name], [question_for(name, number) for number in range(8)]
    all_answered = metric.rows(questions, {question.id: right_answer(name) for question in questions})
    half = metric.rows(questions, {question.id: right_answer(name) for question in questions[:4]})
    assert [row.answer for row in half[4:]] == [None] * 4
    assert [row.score for row in half[4:]] == [0] * 4
    if name not in ("refcoco", "pope"):  # CIDEr is 0 where all references are the same; POPE's headline is no mean
        best, mixed = (next(iter(metric.aggregate(rows).values())) for rows in (all_answered, half))
        assert mixed == best / 2


@pytest.mark.parametrize("name", PER_QUESTION)
def test_a_weight_counts_a_row_that_often(name):
    """Weights equal repeated rows where each row counts by itself, and keep pairs together where it does not."""
    need(name)
    metric, draw = METRICS[name], random.Random(0)
    questions = [question_for(name, number) for number in range(40)]
    rows = metric.rows(questions, {question.id: right_answer(name) for question in questions if draw.random() < 0.7})
    weights = [draw.choice([0, 1, 2]) for _ in range(20)]
    weights = [weight for weight in weights for _ in range(2)]  # both questions about an image
    if name in ("mme", "mmbench"):
        kept = [row for row, weight in zip(rows, weights, strict=True) if weight]
        assert metric.aggregate(rows, [min(weight, 1) for weight in weights]) == pytest.approx(metric.aggregate(kept))
    else:
        repeated = [row for row, weight in zip(rows, weights, strict=True) for _ in range(weight)]
        assert metric.aggregate(rows, weights) == pytest.approx(metric.aggregate(repeated))


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"mm-vet"}))
def test_a_question_without_references_is_refused(name):
    with pytest.raises(ValueError, match=f"'7' has no reference answers, so {name} cannot score it"):
        METRICS[name].check(BenchQuestion(id="7", text="?"))


def test_mm_vet_is_not_scored_here():
    with pytest.raises(ValueError, match=r"scored by GPT-4 .* submission file"):
        find_metric("mm-vet").score("a cat", question_for("mm-vet"))


def test_an_unknown_metric_lists_the_valid_ones():
    with pytest.raises(ValueError, match="metric 'bleu' is unknown; use one of: exact, contains, vqa, anls, relaxed"):
        find_metric("bleu")


def test_a_missing_library_is_named_before_anything_is_scored(monkeypatch):
    monkeypatch.setattr("tokenpacker.evaluate.metrics.metric.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"'anls' needs anls; run: pip install 'tokenpacker\[metrics\]'"):
        find_metric("anls")
    assert find_metric("vqa").name == "vqa"


def test_rows_and_weights_must_fit():
    metric = METRICS["exact"]
    rows = metric.rows([question_for("exact")], {})
    with pytest.raises(ValueError, match="2 weights for 1 rows"):
        metric.aggregate(rows, [1, 1])
    for nothing in ([], rows):
        with pytest.raises(ValueError, match="no questions to aggregate"):
            metric.aggregate(nothing, [0] * len(nothing))


def test_an_id_belongs_to_one_question():
    with pytest.raises(ValueError, match="several questions have the same id"):
        METRICS["exact"].rows([question_for("exact")] * 2, {})


def test_the_example_of_the_package_is_right():
    assert doctest.testmod(tokenpacker.evaluate.metrics).attempted > 0
    assert doctest.testmod(tokenpacker.evaluate.metrics).failed == 0


def test_metrics_and_protocols_load_no_torch():
    code = (
        "import sys, tokenpacker.evaluate.metrics, tokenpacker.evaluate.protocols, tokenpacker.evaluate.published;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'PIL', 'anls', 'pycocoevalcap')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
