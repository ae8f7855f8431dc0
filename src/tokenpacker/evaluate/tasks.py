"""The tasks that a model is tested on: images never trained on, questions, and their only right answers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tokenpacker.scenes import EasyVqa, FinePrint, Regions, Sample
from tokenpacker.scenes.marked_objects import Form, shuffled

NUM_FINE_PRINT_IMAGES = 500
NUM_REGION_IMAGES = 500


@dataclass(frozen=True, kw_only=True)
class Task:
    """A named test set.

    Args:
        description: one line for reports.
        load: returns the samples, always the same ones in the same order.
        max_new_tokens: limit of an answer; every true answer is far shorter.
        regions: whether its questions are about masks, which not every model takes.
    """

    name: str
    description: str
    load: Callable[[], list[Sample]]
    max_new_tokens: int = 8
    regions: bool = False


def _load_easy_vqa() -> list[Sample]:
    samples = EasyVqa("test")
    return [samples[index] for index in range(len(samples))]


def _load_fine_print() -> list[Sample]:
    samples = FinePrint("test")
    return [samples[index] for index in range(NUM_FINE_PRINT_IMAGES)]


def _load_regions(form: Form = "mask", exchanged: bool = False) -> list[Sample]:
    samples = Regions("test", form)
    drawn = [samples[index] for index in range(NUM_REGION_IMAGES)]
    return [shuffled(sample, random.Random(sample.name)) for sample in drawn] if exchanged else drawn


_task_about_regions = partial(Task, max_new_tokens=16, regions=True)
_ALL = (
    Task(
        name="easy-vqa",
        description="official test split: 1,000 images of one shape, 9,673 questions",
        load=_load_easy_vqa,
    ),
    Task(
        name="fine-print",
        description=f"small type in {NUM_FINE_PRINT_IMAGES} generated images, from seeds kept for testing",
        load=_load_fine_print,
    ),
    _task_about_regions(
        name="regions",
        description=f"exactly masked objects in {NUM_REGION_IMAGES} generated images, from seeds kept for testing",
        load=_load_regions,
    ),
    _task_about_regions(
        name="regions-boxes",
        description="the same questions, objects marked by boxes a little too large",
        load=partial(_load_regions, "box"),
    ),
    _task_about_regions(
        name="regions-shuffled",
        description="the same questions with the masks of an image exchanged, so that any score is guessed",
        load=partial(_load_regions, exchanged=True),
    ),
)
TASKS = {task.name: task for task in _ALL}


def find_task(name: str) -> Task:
    """The task of that name. Raises ValueError for an unknown name and lists the valid ones."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; use one of: {', '.join(TASKS)}")
    return TASKS[name]


def normalize_answer(answer: str) -> str:
    """The form in which answers are compared: lower case, without outer white space."""
    return answer.strip().lower()
