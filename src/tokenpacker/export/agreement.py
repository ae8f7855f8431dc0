"""How often an exported model answers as torch's does, and how often each is right, on generated pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from tokenpacker.export.answerer import ExportedAnswerer, Feeds
from tokenpacker.hf import TokenPackerForConditionalGeneration
from tokenpacker.scenes import FinePrint

MAX_NEW_TOKENS = 16  # true answers are shorter
KINDS = ("tiles", "tiles", "one tile", "two images")  # of questions, in turn


@dataclass(frozen=True)
class Agreement:
    """Answers of both beside each other.

    Args:
        equal_answers: questions with the same tokens from both.
        tokens: that torch's model answered in all.
        equal_tokens: of these, those before the first difference of their answer.
        scored: questions with one right answer: those about a single image.
        torch_correct: of these, those that torch's model answered rightly.
    """

    questions: int
    equal_answers: int
    tokens: int
    equal_tokens: int
    scored: int
    torch_correct: int
    exported_correct: int

    def to_dict(self) -> dict[str, int]:
        """A JSON-ready dict."""
        return asdict(self)

    def summary(self) -> str:
        """One line."""
        return (
            f"{self.equal_answers} of {self.questions} answers and {self.equal_tokens} of {self.tokens} tokens equal"
            f" torch's; right by torch {self.torch_correct} of {self.scored}, exported {self.exported_correct}"
        )


@dataclass(frozen=True)
class CheckQuestion:
    """A question with what the answerer takes; `truth` is None if there is no one right answer."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    scale_factor: int | None
    max_image_tokens: int | None
    truth: str | None


def check_questions(answerer: ExportedAnswerer, count: int) -> Iterator[CheckQuestion]:
    """Questions about generated pictures, always the same: cut into tiles, as one tile, and in pairs, at each scale
    factor."""
    pictures, factors, processor = FinePrint("test"), answerer.manifest.scale_factors, answerer.processor
    most = answerer.manifest.max_positions
    for number in range(count):
        sample, kind, factor = (
            pictures[number],
            KINDS[number % len(KINDS)],
            factors[number // len(KINDS) % len(factors)],
        )
        images, limit = [sample.image], None if most is None else most // 3  # two images and a question fit
        if kind == "one tile":
            limit = processor.image_layout((1, 1), scale_factor=factor).num_tokens
        if kind == "two images":
            images.append(pictures[number + count].image)
        question = sample.questions[0]
        content = [*({"type": "image"} for _ in images), {"type": "text", "text": question.text}]
        truth = question.answer if len(images) == 1 else None
        yield CheckQuestion([{"role": "user", "content": content}], images, factor, limit, truth)


def compare_answers(
    model: TokenPackerForConditionalGeneration,
    answerer: ExportedAnswerer,
    num_questions: int = 48,
    progress: Callable[[int], None] | None = None,
) -> Agreement:
    """Asks the model and its export the same questions, with greedy answers.

    Args:
        model: the one that was exported.
        progress: gets the number of questions that were answered.

    Raises:
        ValueError: if a picture and a question are longer than the model reads.
    """
    counts = dict.fromkeys(Agreement.__dataclass_fields__, 0)
    for number, question in enumerate(check_questions(answerer, num_questions), start=1):
        plan = (question.scale_factor, question.max_image_tokens)
        inputs = answerer.prepare(question.messages, question.images, *plan)
        exported = list(answerer.generate(inputs, MAX_NEW_TOKENS))
        expected = answer_by_torch(model, inputs, answerer.end_ids)
        equal = [*takewhile(lambda pair: pair[0] == pair[1], zip(expected, exported, strict=False))]
        counts["questions"] += 1
        counts["equal_answers"] += exported == expected
        counts["tokens"] += len(expected)
        counts["equal_tokens"] += len(equal)
        if question.truth is not None:
            texts = answerer.processor.tokenizer.batch_decode([expected, exported], skip_special_tokens=True)
            right = [text.strip().lower() == question.truth.lower() for text in texts]
            counts["scored"] += 1
            counts["torch_correct"] += right[0]
            counts["exported_correct"] += right[1]
        if progress is not None:
            progress(number)
    return Agreement(**counts)


def answer_by_torch(model: TokenPackerForConditionalGeneration, inputs: Feeds, end_ids: set[int]) -> list[int]:
    """The tokens of the model's greedy answer, the end token included."""
    greedy = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(end_ids) or None,
        pad_token_id=min(end_ids, default=0),
    )
    tensors: dict[str, Any] = {name: torch.from_numpy(value) for name, value in inputs.items()}
    with torch.inference_mode():
        tokens = model.generate(**tensors, generation_config=greedy)
    return [int(token) for token in tokens[0, inputs["input_ids"].shape[1] :]]
