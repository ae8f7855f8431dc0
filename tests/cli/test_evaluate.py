from __future__ import annotations

import json

import pytest

from tokenpacker.evaluate import Task
from tokenpacker.evaluate.asker import Asker
from tokenpacker.scenes import Question, Sample


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
        (("--tasks", "small", "--limit", "0"), "--limit 0 must be at least 1"),
    ],
)
def test_mistakes(one_line_error, tiny_model_dir, arguments, message):
    assert one_line_error("evaluate", *arguments, "--model", tiny_model_dir).startswith(message)


@pytest.fixture
def stopped_after(monkeypatch):
    """Ctrl-C after so many batches."""

    def stop_after(batches: int) -> None:
        answer = Asker.answer
        left = iter(range(batches))

        def stopping(asker, batch, max_new_tokens):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return answer(asker, batch, max_new_tokens)

        monkeypatch.setattr(Asker, "answer", stopping)

    return stop_after


def test_ctrl_c_leaves_the_score_of_what_was_asked_marked_as_a_part(run, tiny_model_dir, stopped_after):
    stopped_after(1)
    arguments = ("evaluate", "--tasks", "small", "--batch-size", 1, "--model", tiny_model_dir)
    result = run(*arguments)
    assert result.exit_code == 130
    part = "small: partial, 0.0% of 2 questions asked before it was stopped, 2 of 4 (95 % interval 0.0% to "
    assert result.stdout.startswith(part)
    assert result.stderr == (
        "stopped; what is printed is the score of what was asked; call it again to ask all, or with --limit N to ask"
        " fewer\n"
    )


def test_ctrl_c_with_json_gives_the_finished_tasks_and_the_part(run, tiny_model_dir, stopped_after):
    stopped_after(3)
    result = run("evaluate", "--tasks", "small,small", "--batch-size", 1, "--model", tiny_model_dir, "--json")
    assert result.exit_code == 130
    whole, part = json.loads(result.stdout)["results"]
    assert (whole["partial"], whole["num_questions"], whole["num_unasked"]) == (False, 4, 0)
    assert (part["partial"], part["num_questions"], part["num_unasked"]) == (True, 2, 2)


def test_ctrl_c_before_the_first_answer_says_that_nothing_is_kept(run, tiny_model_dir, stopped_after):
    stopped_after(0)
    result = run("evaluate", "--tasks", "small", "--model", tiny_model_dir)
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr == "stopped; call it again to ask all, or with --limit N to ask fewer\n"
