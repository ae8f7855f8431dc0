"""Asks a model all questions of a task and counts the right answers.

All questions about an image share the prompt up to the end of the image. This prefix is computed once and `generate`
gets its key/value cache for each of them: the same answers as one `generate` per question, in less time. A region's
token is computed once, too, for all questions that point at it.

Shapes: N images, P tokens up to the end of the image, Q questions about these images, S text tokens.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.evaluate.score import Answer, Score, TaskResult
from tokenpacker.evaluate.tasks import Task, find_task
from tokenpacker.hf.outputs import ImageFeatures
from tokenpacker.hf.versions import CACHE
from tokenpacker.progress import Progress
from tokenpacker.scenes import Sample
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
        limit: number of questions, drawn at random with `seed` from the whole task; None asks all.
        batch_size: questions answered at once, rounded up to whole images.
        progress: shows the progress on standard error.

    Raises:
        EvaluationInterrupted: on Ctrl-C, with the result of the questions asked so far.
        ValueError: for an unknown task, a limit below 1, images and options that the processor refuses, and questions
            about masks to a model that takes none.
        ModuleNotFoundError: when the task's data set is not installed; the message names the remedy.
    """
    task = find_task(task) if isinstance(task, str) else task
    if task.regions and not takes_regions(model):
        raise ValueError(
            f"task {task.name!r} asks about masks, which this model cannot take: its config has no region_config; use a"
            " model that has, such as the carried tiny-regions, or other tasks"
        )
    samples = draw_questions(task.load(), limit, seed)
    asker = Asker(model, processor, scale_factor=scale_factor, max_image_tokens=max_image_tokens)
    answers: list[Answer] = []
    image_tokens: list[int] = []
    num_questions = sum(len(sample.questions) for sample in samples)
    start = time.perf_counter()

    def result() -> TaskResult:
        kinds = sorted({answer.kind for answer in answers})
        return TaskResult(
            task=task.name,
            scale_factor=scale_factor,
            max_image_tokens=max_image_tokens,
            score=Score.of(answers),
            kinds={kind: Score.of(answer for answer in answers if answer.kind == kind) for kind in kinds},
            num_images=len(image_tokens),
            image_tokens=sum(image_tokens) / len(image_tokens),
            seconds=time.perf_counter() - start,
            errors=tuple(answer for answer in answers if not answer.is_correct)[:NUM_ERRORS_KEPT],
            num_unasked=num_questions - len(answers),
        )

    with Progress(task.name, num_questions, shown=progress) as shown:
        try:
            for num_tokens, batch in _batches(asker, samples, batch_size):
                answers += asker.answer(batch, task.max_new_tokens)
                image_tokens += [num_tokens] * len(batch)
                shown.update(len(answers))
        except KeyboardInterrupt:
            if not answers:
                raise
            raise EvaluationInterrupted(result()) from None
    return result()


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C during an evaluation; `result` is that of the questions asked so far."""

    def __init__(self, result: TaskResult):
        super().__init__(f"{result.num_unasked} questions of {result.task} were not asked")
        self.result = result


def takes_regions(model: PreTrainedModel) -> bool:
    """Whether a model has a region module, so that questions may point at masks."""
    return getattr(model.config, "region_config", None) is not None


def draw_questions(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """The samples with `limit` of their questions, drawn at random, without samples that have no question left.

    Raises ValueError when the limit is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit} must be at least 1; leave it out to ask every question")
    places = [(index, place) for index, sample in enumerate(samples) for place in range(len(sample.questions))]
    if limit is not None and limit < len(places):
        places = sorted(random.Random(seed).sample(places, limit))
    drawn: dict[int, list[int]] = defaultdict(list)
    for index, place in places:
        drawn[index].append(place)
    return [
        replace(samples[index], questions=tuple(samples[index].questions[place] for place in kept))
        for index, kept in drawn.items()
    ]


@dataclass(frozen=True)
class PreparedSamples:
    """Images with equally many tokens, and their questions as token ids.

    Args:
        prefix: (N, P) ids that all prompts of an image share, up to the end of the image.
        tails: ids after the prefix, one list for each of the Q questions.
        images: what `get_image_features` takes.
    """

    prefix: Tensor
    tails: list[list[int]]
    images: dict[str, Tensor]


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
        self.options: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}

    def layout(self, sample: Sample) -> ImageLayout:
        """The tiles and tokens of a sample's image."""
        return self.processor.image_layout((sample.image.height, sample.image.width), **self.options)

    def prepare(self, samples: Sequence[Sample]) -> PreparedSamples:
        """Processes the images, which must have equally many tokens, and tokenizes all questions."""
        plain = self._prompt(".")  # without a marker for a mask, whose mask the processor would ask for
        inputs = self.processor(
            images=[[sample.image] for sample in samples],
            text=[plain] * len(samples),
            return_tensors="pt",
            **self.options,
        ).to(self.model.device)
        layouts = [self.layout(sample) for sample in samples]
        start = inputs["input_ids"][0].tolist().index(self.image_token_id)
        prompts = [self._prompt(question.text) for sample in samples for question in sample.questions]
        unexpanded = self.processor.tokenizer(prompts, add_special_tokens=False).input_ids
        images = {name: inputs[name] for name in ("pixel_values", "scale_factors") if name in inputs}
        if any(question.regions for sample in samples for question in sample.questions):
            sizes = [(sample.image.height, sample.image.width) for sample in samples]
            regions = [list(sample.regions) for sample in samples]
            cells = self.processor.region_inputs(regions, sizes, [layout.tile_grid for layout in layouts])
            images |= {name: tensor.to(self.model.device) for name, tensor in cells.items()}
        return PreparedSamples(
            prefix=inputs["input_ids"][:, : start + layouts[0].num_tokens],
            tails=[ids[ids.index(self.image_token_id) + 1 :] for ids in unexpanded],
            images=images,
        )

    @torch.inference_mode()
    def answer(self, samples: Sequence[Sample], max_new_tokens: int) -> list[Answer]:
        """Answers to all questions, in order, about images with equally many tokens."""
        prepared, device = self.prepare(samples), self.model.device
        prefix = prepared.prefix
        images = self.model.get_image_features(**prepared.images)
        shown = {"image": ImageFeatures(pooler_output=images.pooler_output)}
        cache = self.model(input_ids=prefix, mm_encoder_outputs=shown, use_cache=True, logits_to_keep=1)[CACHE]
        asked = [(index, question) for index, sample in enumerate(samples) for question in sample.questions]
        owners = torch.tensor([index for index, _ in asked], device=device)
        cache.batch_select_indices(owners)  # N prefixes -> Q, one for each question
        rows = [torch.tensor(tail, device=device) for tail in prepared.tails]
        tails, mask = (
            pad_sequence(padded, batch_first=True, padding_value=value, padding_side="left")  # (Q, S)
            for padded, value in ((rows, self.pad_token_id), ([torch.ones_like(row) for row in rows], 0))
        )
        marked = {}
        if images.region_tokens is not None:  # the images themselves are in the cache
            marked["image"] = ImageFeatures(region_tokens=images.region_tokens[_pointed_at(samples, device)])
        input_ids = torch.cat([prefix[owners], tails], dim=1)  # (Q, P + S)
        output = self.generate(
            input_ids=input_ids,
            # Padding is between image and question; position ids count the mask's ones, so they continue across it.
            attention_mask=torch.cat([torch.ones_like(prefix[owners]), mask], dim=1),
            **{CACHE: cache},
            max_new_tokens=max_new_tokens,
            mm_encoder_outputs=marked,
        )
        texts = self.processor.tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        return [
            Answer(samples[index].name, question.text, question.kind, text.strip(), question.answer)
            for (index, question), text in zip(asked, texts, strict=True)
        ]

    def generate(self, **inputs: Any) -> Tensor:
        """Greedy answers with their prompts, as `model.generate`."""
        return self.model.generate(do_sample=False, num_beams=1, pad_token_id=self.pad_token_id, **inputs)

    def _prompt(self, question: str) -> str:
        content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": question}]
        conversation = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    @property
    def pad_token_id(self) -> int:
        """The id that fills short rows; any id would do, as it is masked."""
        tokenizer = self.processor.tokenizer
        return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _batches(asker: Asker, samples: Sequence[Sample], batch_size: int) -> Iterator[tuple[int, list[Sample]]]:
    """Samples with equally many image tokens, and this number; only the last have fewer than `batch_size` questions."""
    waiting: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        num_tokens = asker.layout(sample).num_tokens
        waiting[num_tokens].append(sample)
        if sum(len(member.questions) for member in waiting[num_tokens]) >= batch_size:
            yield num_tokens, waiting.pop(num_tokens)
    yield from waiting.items()


def _pointed_at(samples: Sequence[Sample], device: torch.device) -> Tensor:
    """(masks in all questions,), the place of each among the regions of all samples."""
    places: list[int] = []
    first = 0
    for sample in samples:
        places += [first + place for question in sample.questions for place in question.regions]
        first += len(sample.regions)
    return torch.tensor(places, device=device, dtype=torch.int64)
