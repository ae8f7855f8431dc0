"""A metric: a score for each question, and named numbers for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TypeGuard

from tokenpacker.evaluate.bench_question import BenchQuestion

MAX_ANSWER = 10_000
"""Characters from which an answer counts as broken. 1,024 tokens, the longest answer of any protocol, have half."""


@dataclass(frozen=True)
class Row:
    """A question, the answer to it, None if there is none, and the score of this answer."""

    question: BenchQuestion
    answer: str | None
    score: float


Rule = Callable[[str, BenchQuestion], float]
"""The score of an answer, which is text and not blank, to a question with references."""
Summary = Callable[[Sequence[Row], Sequence[float]], dict[str, float]]
"""Named numbers of rows and their weights, the headline first."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """How answers are scored.

    Args:
        name: what `find_metric` knows it by.
        description: one line for reports: the rule, and whose it is.
        rule: scores one answer.
        summary: makes the named numbers.
        package: a library that the rule needs, as it is imported.
        scored_elsewhere: why and where answers are scored, for a benchmark that cannot be scored here.
        scores_single: whether an answer is scored without the others.
    """

    name: str
    description: str
    rule: Rule
    summary: Summary
    package: str | None = None
    scored_elsewhere: str | None = None
    scores_single: bool = True

    def check(self, question: BenchQuestion) -> None:
        """Raises ValueError for a question whose answer this metric cannot score."""
        if self.scored_elsewhere:
            raise ValueError(self.scored_elsewhere)
        if not question.answers:
            raise ValueError(
                f"question {question.id!r} has no reference answers, so {self.name} cannot score it; write a submission"
                " file, or use a split with answers"
            )

    def score(self, answer: object, question: BenchQuestion) -> float:
        """The score of one answer, 0 to 1. An answer that is missing, blank, no text or overlong gets 0.

        Raises:
            ValueError: as `check`.
        """
        self.check(question)
        return float(self.rule(answer, question)) if is_text(answer) else 0.0

    def rows(self, questions: Sequence[BenchQuestion], answers: Mapping[str, object]) -> list[Row]:
        """A row for each question, in order. One whose id `answers` lacks has the answer None and the score 0.

        Raises:
            ValueError: as `check`, and for ids that belong to several questions.
        """
        if len({question.id for question in questions}) < len(questions):
            raise ValueError("several questions have the same id; give each question an id of its own")
        texts = [answers.get(question.id) for question in questions]
        return [
            Row(
                question,
                text if isinstance(text, str) else None,
                0.0 if question.is_broken else self.score(text, question),
            )
            for question, text in zip(questions, texts, strict=True)
        ]

    def aggregate(self, rows: Sequence[Row], weights: Sequence[float] | None = None) -> dict[str, float]:
        """Named numbers, the headline first. Shares are in percent. A split that has no weight is left out.

        Args:
            weights: how often each row counts; None counts each once. A bootstrap over images draws images, and gives
                each row the number of times that its image was drawn: rows that count together stay together.

        Raises:
            ValueError: without rows, or without weight on any.
        """
        weights = [1.0] * len(rows) if weights is None else weights
        if len(weights) != len(rows):
            raise ValueError(f"{len(weights)} weights for {len(rows)} rows; give one for each row")
        kept = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight]
        if not kept:
            raise ValueError("no questions to aggregate; give at least one row with a weight")
        return self.summary([row for row, _ in kept], [weight for _, weight in kept])

    def require(self) -> None:
        """Raises ModuleNotFoundError if the library that this metric needs is not installed."""
        if self.package and find_spec(self.package) is None:
            raise ModuleNotFoundError(
                f"metric {self.name!r} needs {self.package}; run: pip install 'tokenpacker[metrics]'"
            )


def is_text(answer: object) -> TypeGuard[str]:
    """Whether an answer can be scored: text, not blank, and not overlong."""
    return isinstance(answer, str) and len(answer) <= MAX_ANSWER and bool(answer.strip())


def mean(values: Sequence[float], weights: Sequence[float]) -> float:
    """The weighted mean."""
    return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def split_by(
    key: Callable[[Row], str], rows: Sequence[Row], weights: Sequence[float]
) -> dict[str, tuple[list[Row], list[float]]]:
    """Rows and weights by a key, sorted by it. An empty key makes no split."""
    parts: dict[str, tuple[list[Row], list[float]]] = {}
    for row, weight in zip(rows, weights, strict=True):
        if name := key(row):
            part = parts.setdefault(name, ([], []))
            part[0].append(row)
            part[1].append(weight)
    return dict(sorted(parts.items()))


def category(row: Row) -> str:
    """The category of a row's question."""
    return row.question.category


def percent(rows: Sequence[Row], weights: Sequence[float]) -> float:
    """The mean score in percent."""
    return 100 * mean([row.score for row in rows], weights)


def mean_score(name: str = "accuracy") -> Summary:
    """The mean score in percent, and that of each category as `name/category`."""

    def summary(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, float]:
        parts = split_by(category, rows, weights)
        return {name: percent(rows, weights)} | {f"{name}/{part}": percent(*parts[part]) for part in parts}

    return summary


def best(compare: Callable[[str, str], float]) -> Rule:
    """The best score of an answer against any reference."""
    return lambda answer, question: max(compare(answer, reference) for reference in question.answers)
