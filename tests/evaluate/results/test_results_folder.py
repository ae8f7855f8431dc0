"""Folders of results are read, and their questions found again."""

import json

import pytest

from made_up_results import MadeUpRun
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import find_metric
from tokenpacker.evaluate.results.results_folder import AskedTask, ResultsFolder, TaskEntry, ask_again

QUESTIONS = [BenchQuestion(id=str(n), text="what is it?", answers=(f"a {thing}",)) for n, thing in enumerate("abc")]


def read(run: MadeUpRun, asked: AskedTask):
    folder = ResultsFolder(run.write())
    return folder.answers(folder.results[0], asked)


def test_an_own_task_is_found_again_by_its_file(tmp_path, image_of):
    image_of(8, 8).save(tmp_path / "a.png")
    row = {"image": "a.png", "question": "what?", "answer": "noise", "id": "one"}
    (tmp_path / "mine.jsonl").write_text(json.dumps(row))
    task = TaskEntry(name="mine", protocol="plain", metric="contains", data=str(tmp_path / "mine.jsonl"), split="")
    asked = ask_again(task)
    assert (asked.missing, asked.metric.name, asked.questions["one"].answers) == ("", "contains", ("noise",))
    (tmp_path / "mine.jsonl").unlink()
    assert "mine.jsonl is not there" in ask_again(task).missing


def test_answers_that_are_scored_together_get_their_scores_again(tmp_path):
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed")
    run = MadeUpRun(tmp_path)
    run.task("refcoco", "refcoco", QUESTIONS)
    run.plan(Plan(), {"0": ("a a", None), "1": ("nothing", None), "2": ("a c", None)})
    rows = read(run, AskedTask(find_metric("refcoco"), {each.id: each for each in QUESTIONS}))
    assert rows["2"].score > rows["1"].score == 0
    assert {row.score for row in read(run, AskedTask(missing="gone")).values()} == {None}


def test_a_run_that_skips_broken_questions_has_no_rows_of_them(tmp_path):
    run = MadeUpRun(tmp_path)
    run.task("signs", "exact", QUESTIONS)
    run.plan(Plan(), {"0": ("a a", 1.0), "1": (None, 0.0)})
    assert list(read(run, AskedTask())) == ["0", "1"]
    run.content["skip_broken"] = True
    assert list(read(run, AskedTask())) == ["0"]


def test_a_line_that_a_killed_run_left_unfinished_is_no_answer(tmp_path):
    run = MadeUpRun(tmp_path)
    run.task("signs", "exact", QUESTIONS)
    run.plan(Plan(), {"0": ("a a", 1.0)})
    with (tmp_path / "answers/signs/own.jsonl").open("ab") as file:
        file.write(b'{"id": "1", "answ')
    assert list(read(run, AskedTask())) == ["0"]
