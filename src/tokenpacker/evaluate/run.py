"""Ask a model every question of a task, each image encoded once, and count the right answers.

The questions about one image share everything up to its last image token. That prefix is computed once and its
key/value cache handed to `generate` for all of them: the same answers as one `generate` per question, only sooner.

Shapes: N images, P tokens up to and including the last image token, Q questions about these images, S text tokens.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.data import Question, Sample
from tokenpacker.evaluate.score import Answer, Score, TaskResult
from tokenpacker.evaluate.tasks import Task, find_task
from tokenpacker.sequence import ImageLayout

NUM_ERRORS_KEPT = 20


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task: Task | str,
    *,
    scale_factor: int | None = None,
    max_image_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> TaskResult:
    """The model's result on a task: greedy answers, exact match after `normalize_answer`.

    Args:
        task: a `Task`, or the name of one of `TASKS`.
        scale_factor: for every image; None takes the model's own.
        max_image_tokens: budget of tokens per image; None sets no limit.
        limit: so many questions, drawn at random with `seed` from the whole task; None asks all.
        batch_size: questions answered at once, rounded up to whole images.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: for an unknown task, a limit below 1, and what the processor refuses.
        ModuleNotFoundError: when the task's data set is not installed; the message names the remedy.
    """
    task = find_task(task) if isinstance(task, str) else task
    samples = draw_questions(task.load(), limit, seed)
    asker = Asker(model, processor, scale_factor=scale_factor, max_image_tokens=max_image_tokens)
    answers: list[Answer] = []
    num_image_tokens = 0
    start = time.perf_counter()
    with _progress_bar(shown=progress) as bar:
        running = bar.add_task(task.name, total=sum(len(sample.questions) for sample in samples))
        for batch in _batches(map(asker.prepare, samples), batch_size):
            answers += asker.answer(batch, task.max_new_tokens)
            num_image_tokens += sum(prepared.layout.num_tokens for prepared in batch)
            bar.update(running, completed=len(answers))
    return TaskResult(
        task=task.name,
        scale_factor=scale_factor,
        max_image_tokens=max_image_tokens,
        score=Score.of(answers),
        kinds=_score_kinds(answers),
        num_images=len(samples),
        image_tokens=num_image_tokens / len(samples),
        seconds=time.perf_counter() - start,
        errors=tuple(answer for answer in answers if not answer.is_correct)[:NUM_ERRORS_KEPT],
    )


def draw_questions(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """The samples with `limit` of their questions, drawn at random; samples left without a question are dropped.

    Raises:
        ValueError: when the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1; leave it out to ask every question")
    places = [(index, place) for index, sample in enumerate(samples) for place in range(len(sample.questions))]
    if limit is None or limit >= len(places):
        return [sample for sample in samples if sample.questions]
    drawn: dict[int, list[int]] = defaultdict(list)
    for index, place in sorted(random.Random(seed).sample(places, limit)):
        drawn[index].append(place)
    return [
        replace(samples[index], questions=tuple(samples[index].questions[place] for place in kept))
        for index, kept in drawn.items()
    ]


@dataclass(frozen=True)
class PreparedSample:
    """One image and its questions as token ids.

    Args:
        prefix: the P ids that all prompts share, up to the last image token.
        tails: what follows in each question's prompt.
        pixel_values: (tiles, 3, h, w).
        layout: the image's tiles and tokens.
    """

    name: str
    questions: tuple[Question, ...]
    prefix: list[int]
    tails: list[list[int]]
    pixel_values: Tensor
    layout: ImageLayout


class Asker:
    """Asks a model questions about images at one scale factor and budget."""

    def __init__(
        self,
        model: PreTrainedModel,
        processor: ProcessorMixin,
        *,
        scale_factor: int | None = None,
        max_image_tokens: int | None = None,
    ):
        self.model, self.processor = model.eval(), processor
        self.image_token_id: int = model.config.image_token_id
        self.scale_factor, self.max_image_tokens = scale_factor, max_image_tokens

    def prepare(self, sample: Sample) -> PreparedSample:
        """The image through the processor once, and every question's prompt."""
        prompts = [self._prompt(question.text) for question in sample.questions]
        unexpanded = self.processor.tokenizer(prompts, add_special_tokens=False).input_ids
        plan = {"scale_factor": self.scale_factor, "max_image_tokens": self.max_image_tokens}
        inputs = self.processor(images=[[sample.image]], text=[prompts[0]], return_tensors="pt", **plan)
        ids: list[int] = inputs["input_ids"][0].tolist()
        prefix_length = len(ids) - ids[::-1].index(self.image_token_id)
        first_tail = ids[prefix_length:]
        after_image = [prompt[prompt.index(self.image_token_id) + 1 :] for prompt in unexpanded]
        separator = first_tail[: len(first_tail) - len(after_image[0])]  # what closes the image's last row
        return PreparedSample(
            name=sample.name,
            questions=sample.questions,
            prefix=ids[:prefix_length],
            tails=[separator + tail for tail in after_image],
            pixel_values=inputs["pixel_values"],
            layout=self.processor.image_layout((sample.image.height, sample.image.width), **plan),
        )

    @torch.inference_mode()
    def answer(self, batch: list[PreparedSample], max_new_tokens: int) -> list[Answer]:
        """Answers to all questions of samples whose prefixes are equally long, in order."""
        device = self.model.device
        prefixes = torch.tensor([prepared.prefix for prepared in batch], device=device)  # (N, P)
        pixel_values = torch.cat([prepared.pixel_values for prepared in batch]).to(device)
        cache = self.model(
            input_ids=prefixes,
            pixel_values=pixel_values,
            scale_factor=self.scale_factor,
            use_cache=True,
            logits_to_keep=1,
        ).past_key_values
        owners = torch.tensor([index for index, prepared in enumerate(batch) for _ in prepared.tails], device=device)
        cache.batch_select_indices(owners)  # N prefixes -> Q, one for each question
        tails = [tail for prepared in batch for tail in prepared.tails]
        tail_ids, tail_mask = _pad_left(tails, self.pad_token_id, device)  # (Q, S)
        input_ids = torch.cat([prefixes[owners], tail_ids], dim=1)  # (Q, P + S)
        # Padding lies between image and question: position ids count the mask's ones, so they run on across it.
        attention_mask = torch.cat([torch.ones_like(prefixes[owners]), tail_mask], dim=1)
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad_token_id,
        )
        texts = self.processor.tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        asked = [(prepared.name, question) for prepared in batch for question in prepared.questions]
        return [
            Answer(image=name, question=question.text, kind=question.kind, answer=text.strip(), truth=question.answer)
            for (name, question), text in zip(asked, texts, strict=True)
        ]

    def _prompt(self, question: str) -> str:
        content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    @property
    def pad_token_id(self) -> int:
        """What fills short rows; any id would do, for it is masked out."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _batches(samples: Iterator[PreparedSample], batch_size: int) -> Iterator[list[PreparedSample]]:
    """Samples grouped by the length of their prefix, each group with at least `batch_size` questions or the last."""
    waiting: dict[int, list[PreparedSample]] = defaultdict(list)
    for sample in samples:
        group = waiting[len(sample.prefix)]
        group.append(sample)
        if sum(len(member.tails) for member in group) >= batch_size:
            yield waiting.pop(len(sample.prefix))
    yield from waiting.values()


def _pad_left(rows: list[list[int]], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (Q, S) of rows of token ids."""
    width = max(map(len, rows))
    ids = [[pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _score_kinds(answers: list[Answer]) -> dict[str, Score]:
    kinds: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        kinds[answer.kind].append(answer)
    return {kind: Score.of(kinds[kind]) for kind in sorted(kinds)}


def _progress_bar(*, shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), disable=not shown)
