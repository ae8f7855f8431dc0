"""Folders of results."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence

import pytest

from made_up_results import MadeUpRun, answers
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import find_metric
from tokenpacker.evaluate.results import results_comparison, results_page
from tokenpacker.evaluate.results.results_folder import AskedTask
from tokenpacker.evaluate.results.results_page import write_report


def read_from(patch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As the fixture `read_data`, for as long as the patch holds."""
    known: dict[str, Sequence[BenchQuestion]] = {}

    def ask_again(task) -> AskedTask:
        if task.name not in known:
            return AskedTask(missing=f"{task.data} does not exist")
        return AskedTask(find_metric(task.metric), {question.id: question for question in known[task.name]})

    for module in (results_page, results_comparison):
        patch.setattr(module, "ask_again", ask_again)
    return known.update


@pytest.fixture
def read_data(monkeypatch):
    """Gives the questions of tasks without their files: `read_data(name=questions)`; all others are gone."""
    return read_from(monkeypatch)


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def report(tmp_path_factory, signs):
    """The page of a run of three scale factors and two budgets on two tasks, one of them a benchmark of the paper."""
    run = MadeUpRun(tmp_path_factory.mktemp("report"))
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
    with pytest.MonkeyPatch.context() as patch:
        read_from(patch)(signs=signs, textvqa=signs)
        return write_report(run.write())


@pytest.fixture
def elastic(report, tmp_path):
    """The folder of that run, whose data are gone."""
    return shutil.copytree(report.parent, tmp_path / "elastic")
