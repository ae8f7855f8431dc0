"""Intervals by a bootstrap over images."""

from dataclasses import replace

import numpy as np
import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import Row, find_metric
from tokenpacker.evaluate.results.bootstrap import _headline, _images, difference, interval

EXACT = find_metric("exact")


def row(number: int, score: float, image: str = "", answer: str = "yes", **extra) -> Row:
    question = BenchQuestion(
        id=str(number), text="?", images=(image or f"{number}.png",), answers=("yes",), extra=extra
    )
    return Row(question, answer, score)


def rows_of(scores: list[float], images: list[str] | None = None) -> list[Row]:
    return [row(number, score, images[number] if images else "") for number, score in enumerate(scores)]


def test_two_images_give_all_or_nothing():
    # Of 1,000 draws, about 250 take the right image twice, 250 the wrong one twice, and 500 one of each.
    assert interval(EXACT, rows_of([1.0, 0.0])) == (0.0, 100.0)
    assert interval(EXACT, rows_of([1.0, 0.0], ["one.png", "one.png"])) == (50.0, 50.0)  # one image: always both


def test_equal_answers_leave_the_doubt_of_few_images():
    # Wilson: 9 of 9 is at least 9 / (9 + 1.96 ** 2) = 70.09 %.
    assert interval(EXACT, rows_of([1.0] * 9)) == pytest.approx((70.09, 100.0), abs=0.01)
    assert interval(EXACT, rows_of([0.0] * 9)) == pytest.approx((0.0, 29.91), abs=0.01)
    three = rows_of([1.0] * 9, ["a.png", "b.png", "c.png"] * 3)  # three images are no nine
    assert interval(EXACT, three)[0] == pytest.approx(100 * 3 / (3 + 1.959964**2))


def test_an_interval_is_that_of_the_binomial_distribution():
    # The mean of n = 400 independent answers with p = 0.5 has the standard error sqrt(p (1 - p) / n) = 2.5 points.
    low, high = interval(EXACT, rows_of([1.0, 0.0] * 200))
    assert (low, high) == (pytest.approx(50 - 1.96 * 2.5, abs=0.6), pytest.approx(50 + 1.96 * 2.5, abs=0.6))


def test_questions_about_one_image_count_as_one():
    alone = interval(EXACT, rows_of([1.0, 0.0] * 50))
    four_times = [row(number, number % 2, f"{number % 100}.png") for number in range(400)]
    assert interval(EXACT, four_times) == pytest.approx(alone, abs=1)
    low, high = interval(EXACT, [row(number, number % 2) for number in range(400)])
    assert high - low < 0.6 * (alone[1] - alone[0])  # independent, they would say more


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Images of 1 to 3 questions, which are right together: 19 of 20 intervals hold the share of right ones."""
    rng, held, trials = np.random.default_rng(1), 0, 200
    for trial in range(trials):
        rows = []
        for image in range(80):
            score = float(rng.random() < 0.7)
            rows += [row(len(rows) + more, score, f"{image}.png") for more in range(rng.integers(1, 4))]
        low, high = interval(EXACT, rows, draws=200, seed=trial)
        held += low <= 70 <= high
    # Binomial with 200 trials of 0.95 has a standard deviation of 3.1; the bootstrap itself falls short by a percent.
    assert 178 <= held <= 200


def test_the_same_seed_gives_the_same_interval():
    rows = rows_of([1.0, 0.0, 1.0] * 20)
    assert interval(EXACT, rows, seed=3) == interval(EXACT, rows, seed=3)
    assert interval(EXACT, rows, seed=3) != interval(EXACT, rows, seed=4)


def test_a_paired_difference_is_sharper_than_two_intervals():
    before = rows_of([1.0, 0.0] * 100)
    after = [replace(each, score=1.0) if place in (1, 3, 5, 7) else each for place, each in enumerate(before)]
    low, high = difference(EXACT, before, after)
    # 4 of 200 questions gained: 2 points, with the standard error sqrt(0.02 * 0.98 / 200) = 1 point.
    assert (low, high) == (pytest.approx(0.4, abs=0.4), pytest.approx(4, abs=0.6))
    assert difference(EXACT, before, before) == (0.0, 0.0)
    assert difference(EXACT, after, before) == pytest.approx((-high, -low))


def test_a_difference_needs_the_same_questions():
    with pytest.raises(ValueError, match="the same questions in the same order"):
        difference(EXACT, rows_of([1.0, 0.0]), rows_of([1.0]))
    with pytest.raises(ValueError, match="at least one row"):
        interval(EXACT, [])


def pope_rows(count: int) -> list[Row]:
    rng = np.random.default_rng(0)
    rows = []
    for number in range(count):
        split, says, wanted = ("random", "popular", "adversarial")[number % 3], *rng.choice(["yes", "no"], 2)
        question = BenchQuestion(
            id=str(number), text="?", images=(f"{number // 18}.png",), answers=(str(wanted),), extra={"category": split}
        )
        rows.append(Row(question, str(says), float(says == wanted)))
    return rows


def mme_rows(count: int) -> list[Row]:
    return [row(n, float(n % 3 > 0), f"{n // 2}.png", category="count", group=f"{n // 2}") for n in range(count)]


def mmbench_rows(count: int) -> list[Row]:
    return [row(n, float(n % 9 > 0), f"{n // 4}.png", category="x", group=f"{n // 4}") for n in range(count)]


@pytest.mark.parametrize(
    ("metric", "rows", "way"),
    [
        ("exact", rows_of([1.0, 0.25, 0.0] * 20), "by_mean"),
        ("ocrbench", rows_of([1.0, 0.0, 0.0] * 20), "by_mean"),
        ("pope", pope_rows(90), "by_kind"),
        ("mme", mme_rows(60), "by_row"),
        ("mmbench", mmbench_rows(60), "by_row"),
        ("iou", rows_of([0.2, 0.6, 0.9] * 20), "by_kind"),
    ],
)
def test_every_way_gives_what_the_metric_gives(metric, rows, way):
    found, images = find_metric(metric), _images(rows)
    headline = _headline(found, rows, images)
    assert headline.__name__ == way
    rng = np.random.default_rng(5)
    for _ in range(5):
        weights = np.bincount(rng.integers(images.max() + 1, size=images.max() + 1), minlength=images.max() + 1)
        told = found.aggregate(rows, weights[images].tolist())
        assert headline(weights) == pytest.approx(next(iter(told.values())), rel=1e-9)
