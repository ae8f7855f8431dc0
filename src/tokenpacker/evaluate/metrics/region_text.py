"""RefCOCO both ways: descriptions of a region by CIDEr, and boxes for a description by IoU."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics.metric import Metric, Row, is_text, mean, mean_score

HIT = 0.5  # IoU from which a box is right
_COORDINATE = r"\s*(-?\d+(?:\.\d+)?)\s*"
BOX = re.compile(rf"[\[(]{_COORDINATE},{_COORDINATE},{_COORDINATE},{_COORDINATE}[\])]")
# What Penn Treebank tokens are in short descriptions: `don't` is two, `t-shirt` is one, other signs are one each.
WORD = re.compile(r"n't\b|'(?:s|m|d|re|ve|ll)\b|\w+?(?=n't\b)|\w+(?:[-.&/]\w+)*|[^\w\s.,!?;:'\"`-]")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

Box = tuple[float, float, float, float]


def read_box(text: str) -> Box | None:
    """The first four numbers in brackets: x1, y1, x2, y2."""
    found = BOX.search(text)
    return (float(found[1]), float(found[2]), float(found[3]), float(found[4])) if found else None


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes (x1, y1, x2, y2); 0 for boxes without area."""

    def area(box: Box) -> float:
        return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])

    common = (max(first[0], second[0]), max(first[1], second[1]), min(first[2], second[2]), min(first[3], second[3]))
    union = area(first) + area(second) - area(common)
    return area(common) / union if union > 0 else 0.0


def iou_rule(answer: str, question: BenchQuestion) -> float:
    """IoU of the box in the answer with the closest reference; 0 without a box."""
    box = read_box(answer)
    wanted = [reference for text in question.answers if (reference := read_box(text))]
    return max((iou(box, reference) for reference in wanted), default=0.0) if box else 0.0


def iou_summary(rows: Sequence[Row], weights: Sequence[float]) -> dict[str, float]:
    """Share of boxes with an IoU of at least 0.5, and the mean IoU, in percent."""
    scores = [row.score for row in rows]
    hits = mean([float(score >= HIT) for score in scores], weights)
    return {"accuracy@0.5": 100 * hits, "mean IoU": 100 * mean(scores, weights)}


def caption_words(text: str) -> str:
    """A description's words in lower case, separated by spaces, without punctuation.

    The same as those of the Java program that pycocoevalcap has, except that abbreviations (`mr.`) lose their period.
    """
    return " ".join(BRACKETS.get(word, word) for word in WORD.findall(text.lower().replace("’", "'")))


class BoxMetric(Metric):
    """IoU, whose references are boxes."""

    def check(self, question: BenchQuestion) -> None:
        """Raises ValueError for a question without a box as reference."""
        super().check(question)
        if not any(read_box(reference) for reference in question.answers):
            raise ValueError(
                f"question {question.id!r} has the reference {question.answers[0]!r}, which is no box; give it as"
                " [x1, y1, x2, y2]"
            )


class CiderMetric(Metric):
    """CIDEr, which weighs an expression by how rare it is in the references of all questions."""

    def score(self, answer: object, question: BenchQuestion) -> float:
        """Raises ValueError: CIDEr is defined for a set of questions."""
        raise ValueError("CIDEr weighs words by the references of all questions; use Metric.rows with all of them")

    def rows(self, questions: Sequence[BenchQuestion], answers: Mapping[str, object]) -> list[Row]:
        """A row for each question; the score is CIDEr, 0 to 10, 0 for a missing or broken answer.

        Raises:
            ValueError: as `check`, and for ids that belong to several questions.
        """
        from pycocoevalcap.cider.cider import Cider

        asked = [question for question in questions if not question.is_broken]
        for question in asked:
            self.check(question)
        if len({question.id for question in questions}) < len(questions):
            raise ValueError("several questions have the same id; give each question an id of its own")
        given = {question.id: answers.get(question.id) for question in questions}
        references = {question.id: [caption_words(text) for text in question.answers] for question in asked}
        captions = {name: [caption_words(text) if is_text(text := given[name]) else ""] for name in references}
        scores = Cider().compute_score(references, captions)[1] if asked else []
        by_id = dict(zip(references, map(float, scores), strict=True))
        return [
            Row(question, text if isinstance(text := given[question.id], str) else None, by_id.get(question.id, 0.0))
            for question in questions
        ]


IOU = BoxMetric(
    name="iou",
    description="share of boxes with an IoU of at least 0.5; boxes are [x1, y1, x2, y2] in the reference's units",
    rule=iou_rule,
    summary=iou_summary,
)
REFCOCO = CiderMetric(
    name="refcoco",
    description="CIDEr of descriptions times 100, by the package pycocoevalcap, on words split without Java",
    rule=lambda answer, question: 0.0,
    summary=mean_score("cider"),
    package="pycocoevalcap",
    scores_single=False,
)
