"""POPE and MME, whose questions are answered with yes or no."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, Row, category, is_text, mean, split_by

COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR"
)  # fmt: skip


def said_in_pope(answer: str | None) -> str:
    """`yes` or `no` as LLaVA reads it: no if the first sentence has the word no or not; empty for a broken answer."""
    if not is_text(answer):
        return ""
    words = answer.strip().split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def said_in_mme(answer: str) -> str:
    """`yes` or `no` as MME's evaluation tool reads it, from the first four characters; empty if neither is there."""
    said = answer.lower().strip().replace(".", "")
    if len(said) == 1:
        return {"y": "yes", "n": "no"}.get(said, "")
    return next((word for word in ("yes", "no") if word in said[:4]), "")


def wanted(question: BenchQuestion) -> str:
    """The reference: `yes` or `no`; empty for a broken question without one."""
    return question.answers[0].lower().strip().replace(".", "") if question.answers else ""


class _Counts(NamedTuple):
    """Weighted counts of POPE's answers."""

    right: float
    hits: float  # said yes, and it is
    said_yes: float
    are_yes: float
    total: float

    @classmethod
    def of(cls, rows: Sequence[Row], weights: Sequence[float]) -> _Counts:
        right = hits = said_yes = are_yes = 0.0
        for row, weight in zip(rows, weights, strict=True):
            says, is_yes = said_in_pope(row.answer) == "yes", wanted(row.question) == "yes"
            right += row.score * weight
            hits += weight if says and is_yes else 0.0
            said_yes += weight if says else 0.0
            are_yes += weight if is_yes else 0.0
        return cls(right, hits, said_yes, are_yes, sum(weights))

    def numbers(self) -> dict[str, float]:
        shares = {
            "f1": (2 * self.hits, self.said_yes + self.are_yes),
            "accuracy": (self.right, self.total),
            "precision": (self.hits, self.said_yes),
            "recall": (self.hits, self.are_yes),
            "yes ratio": (self.said_yes, self.total),
        }
        return {name: 100 * part / whole if whole else 0.0 for name, (part, whole) in shares.items()}


def by_category(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, tuple[list[Row], list[float]]]:
    """Rows and weights by category. A row without one, such as a broken line, counts for an equal share in each."""
    parts = split_by(category, rows, weights)
    for row, weight in zip(rows, weights, strict=True):
        for part, part_weights in parts.values() if not category(row) else ():
            part.append(row)
            part_weights.append(weight / len(parts))
    return parts


def pope_summary(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, float]:
    """Means over the splits, as papers report POPE; the same for each split; F1 of all questions together."""
    parts = by_category(rows, weights) or {"no split": (list(rows), list(weights))}
    counts = {name: _Counts.of(*part) for name, part in parts.items()}
    together = _Counts(*(sum(values) for values in zip(*counts.values(), strict=True)))
    splits = {name: count.numbers() for name, count in counts.items()}
    means = {name: sum(split[name] for split in splits.values()) / len(splits) for name in together.numbers()}
    by_split = {f"{name}/{split}": value for split, numbers in splits.items() for name, value in numbers.items()}
    return means | (by_split if len(splits) > 1 else {}) | {"f1 of all together": together.numbers()["f1"]}


def mme_summary(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, float]:
    """MME's points: for each category accuracy plus accuracy+, 0 to 200, and the sums of both halves."""
    accuracy: dict[str, float] = {}
    both: dict[str, float] = {}
    for name, (part, part_weights) in by_category(rows, weights).items():
        accuracy[name] = 100 * mean([row.score for row in part], part_weights)
        images = split_by(
            lambda row: str(row.question.extra.get("group", row.question.id)), part, part_weights
        ).values()
        all_right = [float(all(row.score == 1 for row in pair)) for pair, _ in images]
        both[name] = 100 * mean(all_right, [max(pair_weights) for _, pair_weights in images])
    points = {name: accuracy[name] + both[name] for name in accuracy}
    perception = sum(points[name] for name in PERCEPTION if name in points)
    cognition = sum(points[name] for name in COGNITION if name in points)
    return (
        {"perception": perception, "cognition": cognition, "total": perception + cognition}
        | {f"points/{name}": value for name, value in points.items()}
        | {f"accuracy/{name}": value for name, value in accuracy.items()}
        | {f"accuracy+/{name}": value for name, value in both.items()}
    )


class MmeMetric(Metric):
    """MME, whose questions come in pairs about an image."""

    def check(self, question: BenchQuestion) -> None:
        """Raises ValueError for a question without its pair's name, or of no category of MME."""
        super().check(question)
        if "group" not in question.extra or question.category not in PERCEPTION + COGNITION:
            raise ValueError(
                f"question {question.id!r} of MME has category {question.category!r} and group"
                f" {question.extra.get('group')!r}; give the image's name as group, and one of the categories"
                f" {', '.join(PERCEPTION + COGNITION)}"
            )


POPE = Metric(
    name="pope",
    description="F1 of `yes`, mean over POPE's splits; answers read as LLaVA's eval_pope.py does",
    rule=lambda answer, question: said_in_pope(answer) == wanted(question),
    summary=pope_summary,
)
MME = MmeMetric(
    name="mme",
    description="MME's points, accuracy plus accuracy+ of each category, summed for perception and cognition",
    rule=lambda answer, question: said_in_mme(answer) == wanted(question),
    summary=mme_summary,
)
