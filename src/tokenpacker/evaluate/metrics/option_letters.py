"""Multiple choice answered by an option's letter: MMBench, SEED-Bench, ScienceQA.

A letter is read from the answer by rule. No other model is asked what an unclear answer means, as MMBench's server
does with GPT: an answer without a letter is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, Row, category, mean, mean_score, percent, split_by

LETTER = re.compile(r"\(?([A-Za-z])(?:[.):,]|$)")  # `B`, `b`, `(B)`, `B.`, `B) cat`, `B: cat`
SCIENCEQA_LETTER = re.compile(r"^([A-E])(?:$|\. )|The answer is ([A-E])")


def option_letter(answer: str) -> str:
    """The capital letter that an answer is or begins with; empty if there is none, as for `A cat`."""
    found = LETTER.match(answer.strip())
    return found[1].upper() if found else ""


def scienceqa_letter(answer: str) -> str:
    """The letter as LLaVA's eval_science_qa.py reads it: `B`, `B. cat`, or `The answer is B` anywhere."""
    found = SCIENCEQA_LETTER.search(answer.strip().replace("\n", ". "))
    return found[1] or found[2] if found else ""


def letter_of(question: BenchQuestion) -> str:
    """The right option's letter."""
    return question.answers[0].strip().upper()


def circle(row: Row) -> str:
    """Name shared by the rotations of a question: the group, else the id modulo a million as in MMBench's index."""
    group = row.question.extra.get("group")
    number = row.question.id
    return str(group) if group is not None else str(int(number) % 1_000_000) if number.isdecimal() else number


def circular_summary(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, float]:
    """Share of questions right in every rotation of their options, by category, and the share of all answers."""
    circles = split_by(circle, rows, weights).values()
    passed = [Row(part[0].question, None, min(row.score for row in part)) for part, _ in circles]
    counts = [max(part_weights) for _, part_weights in circles]
    parts = split_by(category, passed, counts)
    return (
        {"accuracy": percent(passed, counts)}
        | {f"accuracy/{name}": percent(*part) for name, part in parts.items()}
        | {"accuracy without rotations": percent(rows, weights), "rotations": len(rows) / len(passed)}
    )


def scienceqa_summary(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, float]:
    """Accuracy of the questions with an image (IMG), of all, and by category."""
    with_image = [
        (row, weight)
        for row, weight in zip(rows, weights, strict=True)
        if row.question.images or row.question.is_broken
    ]
    image = {}
    if with_image:
        image["accuracy IMG"] = 100 * mean([row.score for row, _ in with_image], [weight for _, weight in with_image])
    return image | mean_score()(rows, weights)


MMBENCH = Metric(
    name="mmbench",
    description="share of questions right in every rotation of the options; the letter by rule, without a GPT judge",
    rule=lambda answer, question: option_letter(answer) == letter_of(question),
    summary=circular_summary,
)
SEED = Metric(
    name="seed",
    description="share of right letters, by question type (SEED-Bench)",
    rule=lambda answer, question: option_letter(answer) == letter_of(question),
    summary=mean_score(),
)
SCIENCEQA = Metric(
    name="scienceqa",
    description="share of right letters, of questions with an image and of all, read as LLaVA does",
    rule=lambda answer, question: scienceqa_letter(answer) == letter_of(question),
    summary=scienceqa_summary,
)
