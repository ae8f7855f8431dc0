from __future__ import annotations

import pytest

from tokenpacker.data import Question, Sample
from tokenpacker.evaluate import Task


@pytest.fixture(autouse=True)
def small_task(monkeypatch, image_of):
    """A task of four questions under the name `small`."""
    questions = (Question("what?", "cat", "noun"), Question("how many?", "2", "number"))
    samples = [
        Sample(name=f"{index}.png", image=image_of(30, 40, seed=index), questions=questions, caption="", scene=None)
        for index in (1, 2)
    ]
    task = Task(name="small", description="", load=lambda: samples, max_new_tokens=3)
    monkeypatch.setattr("tokenpacker.evaluate.tasks.TASKS", {"small": task})


def test_each_task_gets_a_line_with_its_interval(run, tiny_model_dir):
    result = run("evaluate", "--tasks", "small", "--model", tiny_model_dir)
    assert result.exit_code == 0
    assert result.stdout.startswith("small: 0.0% of 4 questions (95 % interval 0.0% to ")


def test_results_are_one_json_object(run_json, tiny_model_dir):
    arguments = ("--tasks", "small", "--limit", 3, "--scale-factor", 4, "--model", tiny_model_dir)
    (result,) = run_json("evaluate", *arguments)["results"]
    assert (result["task"], result["num_questions"], result["scale_factor"]) == ("small", 3, 4)


def test_a_model_without_regions_says_why_it_cannot_be_asked_about_them(one_line_error, monkeypatch, tiny_model_dir):
    task = Task(name="regions", description="", load=list, regions=True)
    monkeypatch.setattr("tokenpacker.evaluate.tasks.TASKS", {"regions": task})
    message = one_line_error("evaluate", "--tasks", "regions", "--model", tiny_model_dir)
    assert message.startswith("task 'regions' asks about masks, which this model cannot take: its config has no region")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "other"), "task 'other' is unknown; use one of: small"),
        (("--tasks", ","), "--tasks names no task; write for example --tasks easy-vqa,fine-print"),
        (("--tasks", "small", "--limit", "0"), "limit=0 must be at least 1"),
    ],
)
def test_mistakes(one_line_error, tiny_model_dir, arguments, message):
    assert one_line_error("evaluate", *arguments, "--model", tiny_model_dir).startswith(message)
