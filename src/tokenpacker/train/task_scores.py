"""Tasks that a model is asked during its training: those of `TASKS`, and files of your own."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from accelerate.utils import gather_object

from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.asker import Asker
from tokenpacker.evaluate.bench_run import TaskRun
from tokenpacker.evaluate.bench_tasks import draw, find_bench, kind_of
from tokenpacker.evaluate.metrics import find_metric
from tokenpacker.evaluate.tasks import TASKS
from tokenpacker.train.evaluation_config import OWN_TASK, EvaluationConfig

SEED = 0  # of the draw of questions, as in `tokenpacker evaluate`


class TaskScore:
    """A task and those of its questions that are asked at each evaluation.

    Raises:
        ValueError: for a task that does not exist or cannot be scored, and for one about masks if the model takes none.
        ModuleNotFoundError: if a library is missing that the data or the metric need.
    """

    def __init__(self, task: str, settings: EvaluationConfig, *, takes_regions: bool) -> None:
        if task in TASKS and TASKS[task].regions and not takes_regions:
            raise ValueError(
                f"evaluation.tasks: {task} asks about masks, which this model cannot take; leave it out, or train"
                " 'regions', too"
            )
        self.bench = find_bench(task, metric=settings.metric if task.endswith(OWN_TASK) else None)
        if not self.bench.is_scored:
            raise ValueError(f"evaluation.tasks: {task} has no answers to compare with; give them, or leave it out")
        questions = self.bench.loaded.questions
        self.questions = [questions[place] for place in draw(len(questions), settings.limit, SEED)]
        self.batch_size = settings.batch_size

    @property
    def name(self) -> str:
        """The name of its number."""
        return self.bench.name

    def measure(self, model: Any, processor: Any, *, process: int = 0, num_processes: int = 1) -> float:
        """The headline of the task's metric. All processes call it; each asks about its share of the images."""
        images = list(dict.fromkeys(question.image_key for question in self.questions))
        own = set(images[process::num_processes])
        asked = [question for question in self.questions if question.image_key in own]
        with TemporaryDirectory() as folder:
            run = TaskRun(self.bench, asked, Plan(), Path(folder) / "answers.jsonl", skip_broken=False)
            run.answer_rest(Asker(model, processor), self.batch_size, progress=False)
        answers = {id: text for part in gather_object([run.answers]) for id, text in part.items()}
        metric = self.bench.metric
        return next(iter(metric.aggregate(metric.rows(self.questions, answers)).values()))


def check_tasks(settings: EvaluationConfig) -> None:
    """Raises the errors of `TaskScore` that names and files tell, and ValueError for an engine that divides models."""
    for task in settings.tasks:
        kind = kind_of(task)
        if kind == "benchmark":
            raise ValueError(
                f"evaluation.tasks: {task} is a benchmark, which `tokenpacker evaluate` asks after the training; use a"
                f" task of ours, or write some of its questions into a {OWN_TASK} file"
            )
        if kind == "own" and not Path(task).is_file():
            raise ValueError(f"evaluation.tasks: {task} does not exist; check the path")
    if settings.metric is not None:
        find_metric(settings.metric).require()
    engine = next((name for name in ("FSDP", "DEEPSPEED") if _is_used(name)), None)
    if settings.tasks and engine is not None:
        raise ValueError(
            f"evaluation.tasks needs the whole model in each process, which {engine} may divide; measure the loss"
            " (evaluation.held_out_share), and ask the tasks by `tokenpacker evaluate` afterwards"
        )


def _is_used(engine: str) -> bool:
    asked = os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() == "true"
    return asked and (engine == "DEEPSPEED" or torch.accelerator.is_available())  # else FSDP becomes plain DDP
