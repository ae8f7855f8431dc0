"""Intervals by a bootstrap over images: questions about the same image are drawn together.

Each draw takes as many images as there are, with replacement, and aggregates the rows again. The interval goes from the
2.5th to the 97.5th percentile of the draws (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13).

Shapes: Q rows, G images, K kinds of rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from tokenpacker.evaluate.metrics.metric import Metric, Row
from tokenpacker.evaluate.score import Score

DRAWS = 1000
PERCENTILES = (2.5, 97.5)  # of a 95 % interval
EXACT = 1e-9  # relative; two ways to compute one number differ by rounding alone

Headline = Callable[[np.ndarray], float]
"""The headline for a weight for each image (G,)."""


def interval(metric: Metric, rows: Sequence[Row], draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a metric's headline, (low, high).

    Where all answers are right, or all wrong, no draw differs; it is Wilson's interval then, of as many questions as
    there are images.

    Raises:
        ValueError: without rows.
    """
    images = _images(rows)
    headline = _headline(metric, rows, images)
    count = int(images.max()) + 1
    if headline(np.ones(count)) in (0.0, 100.0) and len({row.score for row in rows} | {0.0, 1.0}) == 2:
        right = count if rows[0].score else 0
        low, high = Score(count, right).interval
        return 100 * low, 100 * high
    return _percentiles([headline(weights) for weights in _weights(images, draws, seed)])


def difference(
    metric: Metric, first: Sequence[Row], second: Sequence[Row], draws: int = DRAWS, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of the second headline minus the first; both runs get the same images in each draw.

    Args:
        first: a run's rows.
        second: the other run's rows, of the same questions in the same order.

    Raises:
        ValueError: without rows, or if the questions differ.
    """
    if [row.question.id for row in first] != [row.question.id for row in second]:
        raise ValueError("a paired bootstrap needs the same questions in the same order; keep the shared ones of both")
    images = _images(first)
    before, after = (_headline(metric, rows, images) for rows in (first, second))
    return _percentiles([after(weights) - before(weights) for weights in _weights(images, draws, seed)])


def _images(rows: Sequence[Row]) -> np.ndarray:
    """(Q,), the number of each row's image. Raises ValueError without rows."""
    if not rows:
        raise ValueError("a bootstrap needs at least one row; there is none")
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(row.question.image_key, len(numbers)) for row in rows])


def _weights(images: np.ndarray, draws: int, seed: int) -> Iterator[np.ndarray]:
    """For each draw (G,), how often each image was drawn."""
    rng, count = np.random.default_rng(seed), int(images.max()) + 1
    for _ in range(draws):
        yield np.bincount(rng.integers(count, size=count), minlength=count)


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    """A draw without the headline, such as one without a question of its split, is left out."""
    low, high = np.nanpercentile(values, PERCENTILES)
    return float(low), float(high)


def _headline(metric: Metric, rows: Sequence[Row], images: np.ndarray) -> Headline:
    """The fastest of three ways to the headline that gives what `Metric.aggregate` gives.

    Tried are the mean score times a factor, and an aggregate of one row for each kind. Headlines are ratios of sums of
    weights, so two ways that agree at random weights agree at all, except with probability 0.
    """
    name = next(iter(metric.aggregate(rows)))

    def aggregate(kept: Sequence[Row], weights: np.ndarray) -> float:
        return metric.aggregate(kept, weights.tolist()).get(name, math.nan)

    def by_row(weights: np.ndarray) -> float:
        return aggregate(rows, weights[images])

    counts = np.bincount(images)  # (G,)
    scores = np.bincount(images, [row.score for row in rows])  # (G,), sums
    ones = np.ones(len(counts))
    factor = by_row(ones) * counts.sum() / scores.sum() if scores.sum() else 0.0

    def by_mean(weights: np.ndarray) -> float:
        return float(factor * (weights @ scores) / (weights @ counts))

    numbers: dict[tuple[object, ...], int] = {}
    kinds = np.array([numbers.setdefault(_kind(row), len(numbers)) for row in rows])  # (Q,)
    _, places = np.unique(kinds, return_index=True)
    examples = [rows[place] for place in places]  # (K,)

    def by_kind(weights: np.ndarray) -> float:
        return aggregate(examples, np.bincount(kinds, weights[images]))

    rng = np.random.default_rng(0)
    trials = [ones, *(rng.uniform(0.5, 1.5, len(counts)) for _ in range(2))]
    expected = [by_row(trial) for trial in trials]
    for way in (by_mean, by_kind) if len(examples) < len(rows) else (by_mean,):
        if all(math.isclose(way(trial), value, rel_tol=EXACT) for trial, value in zip(trials, expected, strict=True)):
            return way
    return by_row


def _kind(row: Row) -> tuple[object, ...]:
    """Same for rows that most metrics treat alike."""
    question = row.question
    return row.answer, row.score, question.answers, question.category, question.options, bool(question.images)
