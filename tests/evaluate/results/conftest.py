"""Folders of results."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from made_up_results import MadeUpRun, answers
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import find_metric
from tokenpacker.evaluate.results import results_comparison, results_page
from tokenpacker.evaluate.results.results_folder import AskedTask


@pytest.fixture
def read_data(monkeypatch):
    """Gives the questions of tasks without their files: `read_data(name=questions)`; all others are gone."""
    known: dict[str, Sequence[BenchQuestion]] = {}

    def ask_again(task) -> AskedTask:
        if task.name not in known:
            return AskedTask(missing=f"{task.data} does not exist")
        return AskedTask(find_metric(task.metric), {question.id: question for question in known[task.name]})

    for module in (results_page, results_comparison):
        monkeypatch.setattr(module, "ask_again", ask_again)
    return known.update


@pytest.fixture
def signs(image_of):
    """20 questions about 20 pictures, in two categories."""
    return [
        BenchQuestion(
            id=f"sign-{number}",
            text=f"what is written on sign {number}?",
            images=(image_of(90, 120, seed=number),),
            answers=("stop",),
            extra={"category": ("word", "number")[number % 2]},
        )
        for number in range(20)
    ]


@pytest.fixture
def elastic(tmp_path, signs, read_data):
    """A run of three scale factors and two budgets on two tasks, one of them a benchmark of the paper."""
    run = MadeUpRun(tmp_path / "elastic")
    data = {"protocol": "no-ocr", "split": "val", "source": "textvqa/val.json", "data": "textvqa"}
    problem = {"kind": "missing image", "where": "sign-0", "text": "the image x.png is <missing>"}
    for name, task in (("signs", {}), ("textvqa", {**data, "problems": [problem]})):
        run.task(name, "exact", signs, **task)
        for plan, wrong in (
            (Plan(scale_factor=2), 1),
            (Plan(scale_factor=3), 3),
            (Plan(scale_factor=4), 6),
            (Plan(max_image_tokens=120), 5),
            (Plan(max_image_tokens=240), 2),
        ):
            run.plan(plan, answers(signs, wrong))
    read_data(signs=signs, textvqa=signs)
    return run.write()
