"""Asks a model all questions of a task with exact truth, and counts the right answers."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, ProcessorMixin

from tokenpacker.evaluate.asker import Asker, ImageGroup, Reply
from tokenpacker.evaluate.bench_tasks import draw
from tokenpacker.evaluate.score import Answer, Score, TaskResult
from tokenpacker.evaluate.tasks import Task, find_task
from tokenpacker.progress import Progress
from tokenpacker.router import ScaleFactor
from tokenpacker.scenes import Sample

NUM_ERRORS_KEPT = 20


def evaluate(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    task: Task | str,
    *,
    scale_factor: ScaleFactor | None = None,
    max_image_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    progress: bool = True,
) -> TaskResult:
    """The model's result on a task: greedy answers, exact match after `normalize_answer`.

    Args:
        task: a `Task`, or the name of one of `TASKS`.
        scale_factor: for every image; "auto" for each tile by its detail, None for the model's own.
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
    if task.regions:
        require_regions(model, task.name)
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
            for batch in asker.batches(map(group_of, samples), batch_size, task.max_new_tokens):
                for group, replies in zip(batch, asker.answer(batch, task.max_new_tokens), strict=True):
                    known = all_of(replies)
                    answers += answers_of(group.of, known)
                    image_tokens.append(known[0].image_tokens)
                shown.update(len(answers))
        except KeyboardInterrupt:
            if not answers:
                raise
            raise EvaluationInterrupted(result()) from None
    return result()


def all_of(replies: Sequence[Reply | ValueError] | ValueError) -> list[Reply]:
    """The replies to a group. Raises the error that stands in place of one or of all."""
    found = []
    for reply in [replies] if isinstance(replies, ValueError) else replies:
        if isinstance(reply, ValueError):
            raise reply
        found.append(reply)
    return found


class EvaluationInterrupted(KeyboardInterrupt):
    """Ctrl-C during an evaluation; `result` is that of the questions asked so far."""

    def __init__(self, result: TaskResult):
        super().__init__(f"{result.num_unasked} questions of {result.task} were not asked")
        self.result = result


def takes_regions(model: PreTrainedModel) -> bool:
    """Whether a model has a region module, so that questions may point at masks."""
    return getattr(model.config, "region_config", None) is not None


def require_regions(model: PreTrainedModel, task: str) -> None:
    """Raises ValueError for a model that takes no masks, which the task asks about."""
    if not takes_regions(model):
        raise ValueError(
            f"task {task!r} asks about masks, which this model cannot take: its config has no region_config; use a"
            " model that has, such as the carried tiny-regions, or other tasks"
        )


def group_of(sample: Sample) -> ImageGroup:
    """A sample's questions as the asker takes them."""
    return ImageGroup(
        images=(sample.image,),
        texts=tuple(question.text for question in sample.questions),
        regions=sample.regions,
        marked=tuple(question.regions for question in sample.questions),
        of=sample,
    )


def answers_of(sample: Sample, replies: Sequence[Reply]) -> list[Answer]:
    """The replies to a sample's questions, beside the truth."""
    return [
        Answer(sample.name, question.text, question.kind, reply.text, question.answer)
        for question, reply in zip(sample.questions, replies, strict=True)
    ]


def draw_questions(samples: list[Sample], limit: int | None, seed: int) -> list[Sample]:
    """The samples with `limit` of their questions, drawn at random, without samples that have no question left.

    Raises ValueError when the limit is below 1.
    """
    places = [(index, place) for index, sample in enumerate(samples) for place in range(len(sample.questions))]
    drawn: dict[int, list[int]] = defaultdict(list)
    for index, place in (places[number] for number in draw(len(places), limit, seed)):
        drawn[index].append(place)
    return [
        replace(samples[index], questions=tuple(samples[index].questions[place] for place in kept))
        for index, kept in drawn.items()
    ]
