"""The result of a test: counts, accuracies with their uncertainty, times, and examples of errors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from tokenpacker.evaluate.tasks import normalize_answer
from tokenpacker.router import ScaleFactor

Z_95 = 1.959964  # standard normal quantile of a two-sided 95 % interval


@dataclass(frozen=True)
class Answer:
    """One question with the model's answer beside the truth."""

    image: str
    question: str
    kind: str
    answer: str
    truth: str

    @property
    def is_correct(self) -> bool:
        """Exact match after `normalize_answer` of both."""
        return normalize_answer(self.answer) == normalize_answer(self.truth)


@dataclass(frozen=True)
class Score:
    """The number of questions and of correct answers."""

    num_questions: int
    num_correct: int

    @classmethod
    def of(cls, answers: Iterable[Answer]) -> Score:
        """The score of these answers."""
        outcomes = [answer.is_correct for answer in answers]
        return cls(len(outcomes), sum(outcomes))

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1."""
        return self.num_correct / self.num_questions if self.num_questions else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy.

        It takes the questions as independent. Questions about the same image are not, so the true uncertainty may be
        larger.
        """
        if not self.num_questions:
            return 0.0, 1.0
        spread = Z_95**2 / self.num_questions
        center = self.accuracy + spread / 2
        margin = math.sqrt(self.accuracy * (1 - self.accuracy) * spread + spread**2 / 4)
        return max(0.0, (center - margin) / (1 + spread)), min(1.0, (center + margin) / (1 + spread))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**asdict(self), "accuracy": self.accuracy, "interval_95": list(self.interval)}


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The outcome of one task.

    Args:
        scale_factor: as asked for; None stands for the model's own.
        kinds: score of each kind of question.
        image_tokens: mean number of image tokens of an image, separators included.
        seconds: wall-clock time of the whole run, from images to answers.
        errors: the first wrong answers, in the order of the data.
        num_unasked: questions that an interruption has left out, so that the score is that of a part.
    """

    task: str
    scale_factor: ScaleFactor | None
    max_image_tokens: int | None
    score: Score
    kinds: dict[str, Score]
    num_images: int
    image_tokens: float
    seconds: float
    errors: tuple[Answer, ...]
    num_unasked: int = 0

    @property
    def accuracy(self) -> float:
        """Share of correct answers, 0 to 1."""
        return self.score.accuracy

    @property
    def milliseconds_per_question(self) -> float:
        """Wall-clock time of the run per question."""
        return 1000 * self.seconds / max(1, self.score.num_questions)

    def summary(self) -> str:
        """One line: accuracy with its interval, and what an image and a question cost."""
        asked, (low, high) = self.score.num_questions, self.score.interval
        part = f" asked before it was stopped, {asked:,} of {asked + self.num_unasked:,}" if self.num_unasked else ""
        return (
            f"{self.task}: {'partial, ' if part else ''}{self.accuracy:.1%} of {asked} questions{part}"
            f" (95 % interval {low:.1%} to {high:.1%}), {self.image_tokens:.0f} tokens an image,"
            f" {self.milliseconds_per_question:.1f} ms a question"
        )

    def to_row(self) -> dict[str, Any]:
        """The counts for a table of several results, JSON-ready."""
        return {
            "correct": self.score.num_correct,
            "questions": self.score.num_questions,
            "image_tokens": round(self.image_tokens, 1),
            "seconds": round(self.seconds, 1),
            "kinds": {kind: [score.num_correct, score.num_questions] for kind, score in self.kinds.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {
            "task": self.task,
            "scale_factor": self.scale_factor,
            "max_image_tokens": self.max_image_tokens,
            **self.score.to_dict(),
            "kinds": {kind: score.to_dict() for kind, score in self.kinds.items()},
            "num_images": self.num_images,
            "image_tokens": self.image_tokens,
            "seconds": self.seconds,
            "milliseconds_per_question": self.milliseconds_per_question,
            "partial": self.num_unasked > 0,
            "num_unasked": self.num_unasked,
            "errors": [asdict(error) for error in self.errors],
        }
