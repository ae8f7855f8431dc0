"""Ask a model every question of a task, each image encoded once, and count the right answers.

The questions about one image share everything up to its last image token. That prefix is computed once and its
key/value cache handed to `generate` for all of them: the same answers as one `generate` per question, only sooner.

Questions about masks are asked the same way: a region's token is computed once, for all questions that point at it.

Shapes: N images, P tokens up to and including the last image token, Q questions about these images, S text tokens, R
regions of these images, D language width.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.evaluate.score import Answer, Score, TaskResult
from tokenpacker.evaluate.tasks import Task, find_task
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import CACHE
from tokenpacker.progress import Progress
from tokenpacker.scenes import Question, Sample
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
        progress: show how far it is on standard error.

    Raises:
        EvaluationInterrupted: on Ctrl-C, with the result of what was asked.
        ValueError: for an unknown task, a limit below 1, what the processor refuses, and questions about masks to a
            model that takes none.
        ModuleNotFoundError: when the task's data set is not installed; the message names the remedy.
    """
    task = find_task(task) if isinstance(task, str) else task
    _require_regions(task, model)
    samples = draw_questions(task.load(), limit, seed)
    asker = Asker(model, processor, scale_factor=scale_factor, max_image_tokens=max_image_tokens)
    answers: list[Answer] = []
    num_questions = sum(len(sample.questions) for sample in samples)
    num_images = num_image_tokens = 0
    start = time.perf_counter()

    def result() -> TaskResult:
        return TaskResult(
            task=task.name,
            scale_factor=scale_factor,
            max_image_tokens=max_image_tokens,
            score=Score.of(answers),
            kinds=_score_kinds(answers),
            num_images=num_images,
            image_tokens=num_image_tokens / num_images,
            seconds=time.perf_counter() - start,
            errors=tuple(answer for answer in answers if not answer.is_correct)[:NUM_ERRORS_KEPT],
            num_unasked=num_questions - len(answers),
        )

    with Progress(task.name, num_questions, shown=progress) as shown:
        try:
            for batch in _batches(map(asker.prepare, samples), batch_size):
                answers += asker.answer(batch, task.max_new_tokens)
                num_images += len(batch)
                num_image_tokens += sum(prepared.layout.num_tokens for prepared in batch)
                shown.update(len(answers))
        except KeyboardInterrupt:
            if not answers:
                raise
            raise EvaluationInterrupted(result()) from None
    return result()


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C while questions were asked; `result` is that of the questions asked so far."""

    def __init__(self, result: TaskResult):
        super().__init__(f"{result.num_unasked} questions of {result.task} were not asked")
        self.result = result


def takes_regions(model: PreTrainedModel) -> bool:
    """Whether a model has a region module, so that questions may point at masks."""
    return getattr(model.config, "region_config", None) is not None


def _require_regions(task: Task, model: PreTrainedModel) -> None:
    if task.regions and not takes_regions(model):
        raise ValueError(
            f"task {task.name!r} asks about masks, which this model cannot take: its config has no region_config; use a"
            " model that has, such as the carried tiny-regions, or other tasks"
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
        scale_factors: (tiles,); None for a projector whose tokens have none.
        region_cells: (R, tiles, patches) of the image's regions; None where no question is about one.
    """

    name: str
    questions: tuple[Question, ...]
    prefix: list[int]
    tails: list[list[int]]
    pixel_values: Tensor
    layout: ImageLayout
    scale_factors: Tensor | None = None
    region_cells: Tensor | None = None


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
        plain = self._prompt(".")  # without a mask, which the processor would want to see
        prompts = [plain, *(self._prompt(question.text) for question in sample.questions)]
        unexpanded = self.processor.tokenizer(prompts, add_special_tokens=False).input_ids
        plan = {"scale_factor": self.scale_factor, "max_image_tokens": self.max_image_tokens}
        inputs = self.processor(images=[[sample.image]], text=[plain], return_tensors="pt", **plan)
        ids: list[int] = inputs["input_ids"][0].tolist()
        prefix_length = len(ids) - ids[::-1].index(self.image_token_id)
        first_tail = ids[prefix_length:]
        after_image = [prompt[prompt.index(self.image_token_id) + 1 :] for prompt in unexpanded]
        separator = first_tail[: len(first_tail) - len(after_image[0])]  # what closes the image's last row
        size = (sample.image.height, sample.image.width)
        layout = self.processor.image_layout(size, **plan)
        cells = None
        if any(question.regions for question in sample.questions):
            regions = self.processor.region_inputs([list(sample.regions)], [size], [layout.tile_grid])
            cells = regions["region_cells"]
        return PreparedSample(
            name=sample.name,
            questions=sample.questions,
            prefix=ids[:prefix_length],
            tails=[separator + tail for tail in after_image[1:]],
            pixel_values=inputs["pixel_values"],
            layout=layout,
            scale_factors=inputs.get("scale_factors"),
            region_cells=cells,
        )

    @torch.inference_mode()
    def answer(self, batch: list[PreparedSample], max_new_tokens: int) -> list[Answer]:
        """Answers to all questions of samples whose prefixes are equally long, in order."""
        device = self.model.device
        prefixes = torch.tensor([prepared.prefix for prepared in batch], device=device)  # (N, P)
        pixel_values = torch.cat([prepared.pixel_values for prepared in batch]).to(device)
        factors = [prepared.scale_factors for prepared in batch if prepared.scale_factors is not None]
        images = self.model.get_image_features(
            pixel_values, scale_factors=torch.cat(factors) if factors else None, **_region_inputs(batch, device)
        )
        shown = {"image": ImageFeatures(pooler_output=images.pooler_output)}
        cache = self.model(input_ids=prefixes, mm_encoder_outputs=shown, use_cache=True, logits_to_keep=1)[CACHE]
        owners = torch.tensor([index for index, prepared in enumerate(batch) for _ in prepared.tails], device=device)
        cache.batch_select_indices(owners)  # N prefixes -> Q, one for each question
        tails = [tail for prepared in batch for tail in prepared.tails]
        tail_ids, tail_mask = _pad_left(tails, self.pad_token_id, device)  # (Q, S)
        input_ids = torch.cat([prefixes[owners], tail_ids], dim=1)  # (Q, P + S)
        # Padding lies between image and question: position ids count the mask's ones, so they run on across it.
        attention_mask = torch.cat([torch.ones_like(prefixes[owners]), tail_mask], dim=1)
        marked = {}
        if images.region_tokens is not None:  # the images themselves are in the cache
            marked["image"] = ImageFeatures(region_tokens=images.region_tokens[_pointed_at(batch, device)])
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **{CACHE: cache},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=self.pad_token_id,
            mm_encoder_outputs=marked,
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


def _region_inputs(batch: list[PreparedSample], device: torch.device) -> dict[str, Tensor]:
    """`region_cells` (R, tiles, patches) and `region_first_tile` (R,) of all regions; nothing where there are none."""
    cells, first_tiles, tile = [], [], 0
    for prepared in batch:
        if prepared.region_cells is not None:
            cells.append(prepared.region_cells)
            first_tiles += [tile] * len(prepared.region_cells)
        tile += len(prepared.pixel_values)
    if not cells:
        return {}
    return {
        "region_cells": torch.cat(cells).to(device),
        "region_first_tile": torch.tensor(first_tiles, device=device),
    }


def _pointed_at(batch: list[PreparedSample], device: torch.device) -> Tensor:
    """(masks in all questions,), which of the batch's regions each of them is."""
    places: list[int] = []
    first = 0
    for prepared in batch:
        if prepared.region_cells is not None:
            places += [first + place for question in prepared.questions for place in question.regions]
            first += len(prepared.region_cells)
    return torch.tensor(places, device=device, dtype=torch.int64)


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
