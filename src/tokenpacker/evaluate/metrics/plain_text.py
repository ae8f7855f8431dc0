"""Answers compared as text: exact match, containment, ANLS, relaxed accuracy, GQA."""

from __future__ import annotations

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, best, mean_score

MAX_RELATIVE_ERROR = 0.05  # ChartQA, section 5.1
ANLS_THRESHOLD = 0.5  # Biten et al. 2019, equation 1


def plain(text: str) -> str:
    """Lower case, white space collapsed."""
    return " ".join(text.lower().split())


def anls(answer: str, question: BenchQuestion) -> float:
    """Average normalized Levenshtein similarity to the closest reference; 0 below the threshold."""
    from anls import anls_score

    return anls_score(answer, list(question.answers), ANLS_THRESHOLD)


def relaxed(answer: str, reference: str) -> float:
    """1 for a number within 5 % of the reference, or the same text in any case."""
    given, wanted = number(answer), number(reference)
    if given is not None and wanted:  # of 0, there are no 5 %
        return float(abs(given - wanted) / abs(wanted) <= MAX_RELATIVE_ERROR)
    return float(answer.strip().lower() == reference.strip().lower())


def number(text: str) -> float | None:
    """The number that a text is; `5%` is 0.05."""
    text = text.strip()
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


EXACT = Metric(
    name="exact",
    description="share of answers that equal a reference, in any case and spacing",
    rule=best(lambda answer, reference: plain(answer) == plain(reference)),
    summary=mean_score(),
)
CONTAINS = Metric(
    name="contains",
    description="share of answers that contain a reference, in any case and spacing",
    rule=best(lambda answer, reference: plain(reference) in plain(answer)),
    summary=mean_score(),
)
ANLS = Metric(
    name="anls",
    description="average normalized Levenshtein similarity, threshold 0.5 (DocVQA), by the package anls",
    rule=anls,
    summary=mean_score("anls"),
    package="anls",
)
RELAXED = Metric(
    name="relaxed",
    description="share of numbers within 5 % of the reference, and of other answers that equal it (ChartQA)",
    rule=best(relaxed),
    summary=mean_score(),
)
GQA = Metric(
    name="gqa",
    description="share of answers that equal the reference, without a final period (LLaVA's conversion for GQA)",
    rule=best(lambda answer, reference: answer.strip().rstrip(".").lower() == reference.strip().lower()),
    summary=mean_score(),
)
