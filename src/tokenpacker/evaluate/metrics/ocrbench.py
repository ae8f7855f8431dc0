"""OCRBench: whether the answer contains the text, 1,000 questions in five parts.

Source: https://github.com/Yuliang-Liu/MultimodalOCR, and full-width characters folded as lmms-eval does.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, Row, mean, split_by

FORMULAS = "Handwritten Mathematical Expression Recognition"
PARTS = {
    "Text Recognition": 300,
    "Scene Text-centric VQA": 200,
    "Doc-oriented VQA": 200,
    "Key Information Extraction": 200,
    FORMULAS: 100,
}
ALL = 1000
FULL_WIDTH = {0xFF01 + offset: 0x21 + offset for offset in range(0x5E)} | {0x3000: 0x20}


def part_of(row: Row) -> str:
    """The part that a question's type belongs to: six types, such as `Digit String Recognition`, are one part."""
    return row.question.category if row.question.category in PARTS else "Text Recognition"


def ocrbench_rule(answer: str, question: BenchQuestion) -> float:
    """1 if a reference is in the answer: in any case, or, for a formula, without spaces."""

    def form(text: str) -> str:
        text = text.strip().replace("\n", " ")
        return text.replace(" ", "") if question.category == FORMULAS else text.translate(FULL_WIDTH).lower().strip()

    return float(any(form(reference) in form(answer) for reference in question.answers))


def ocrbench_summary(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, float]:
    """Right answers of 1,000 and of each part; scaled to these where fewer questions were asked."""
    parts = split_by(part_of, rows, weights)
    scores = {name: mean([row.score for row in part], counts) for name, (part, counts) in parts.items()}
    types = split_by(lambda row: row.question.category, rows, weights)
    return (
        {"score": ALL * mean([row.score for row in rows], weights)}
        | {f"score/{name}": PARTS[name] * scores[name] for name in PARTS if name in scores}
        | {
            f"accuracy/{name}": 100 * mean([row.score for row in part], counts)
            for name, (part, counts) in types.items()
        }
    )


OCRBENCH = Metric(
    name="ocrbench",
    description="right answers of 1,000, and of each of the five parts; an answer that contains the text is right",
    rule=ocrbench_rule,
    summary=ocrbench_summary,
)
