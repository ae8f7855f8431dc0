"""The answer to a question as a line of JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class AnswerRow:
    """One question of a run.

    Args:
        id: of the question.
        prompt: text of the user's turn, without the images.
        answer: the model's; None for a question that could not be asked.
        score: of this answer by the benchmark's metric; None where only a server can tell.
        image_tokens: of all images of the question, separators included.
        prompt_tokens: of the whole prompt, with the image tokens.
        answer_tokens: without the end of the answer.
        problem: why the question could not be asked.
    """

    id: str
    prompt: str
    answer: str | None
    score: float | None
    image_tokens: int
    prompt_tokens: int
    answer_tokens: int
    problem: str | None = None

    def to_line(self) -> bytes:
        """The row as a line of JSON in UTF-8. Half a character of UTF-16 in a text stays an escape."""
        return json.dumps(asdict(self), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> AnswerRow:
        """The row of a line. Raises TypeError for other fields."""
        return cls(**content)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How many tokens the images of a run get.

    Args:
        scale_factor: "auto" for each tile by its detail; None takes the model's own.
        max_image_tokens: of each image; None sets no limit.
    """

    scale_factor: int | Literal["auto"] | None = None
    max_image_tokens: int | None = None

    @property
    def name(self) -> str:
        """Name of its files: `s2`, `auto`, `max200`, `s3-max200`; `own` without options."""
        factor = f"s{self.scale_factor}" if isinstance(self.scale_factor, int) else self.scale_factor or ""
        parts = [factor, f"max{self.max_image_tokens or ''}"]
        return "-".join(part for part in parts if part and part != "max") or "own"
