from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tokenpacker.evaluate import Task, bench_tasks
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
        (("--tasks", "other"), "task 'other' is unknown; use a file that ends in .jsonl, or some of: small, "),
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


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    """This model would never end an answer."""
    found = bench_tasks.find_protocol
    monkeypatch.setattr(bench_tasks, "find_protocol", lambda *names: replace(found(*names), max_new_tokens=3))


@pytest.fixture
def mine(tmp_path, image_of):
    """Own questions about two images, one of which is missing."""
    image_of(30, 40).save(tmp_path / "a.png")
    rows = [{"image": name, "question": "what?", "answer": "cat"} for name in ("a.png", "a.png", "gone.png")]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "mine.jsonl"


def test_own_questions_are_scored_and_their_problems_told(run, mine, tiny_model_dir):
    result = run("evaluate", "--tasks", mine, "--model", tiny_model_dir, "--metric", "contains")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(
        "mine own: accuracy 0.0 (95 % interval 0.0 to 65.8), 3 questions, 1 of them not asked"
    )
    first, second = result.stderr.splitlines()[:2]
    assert first == "mine: 1 problem (1 missing image), kept in the score; --skip-broken leaves them out"
    assert second.startswith("  3: the image ")


def test_each_scale_factor_and_each_budget_is_a_run(run, run_json, mine, tiny_model_dir, tmp_path):
    plans = ("--scale-factor", "2,4", "--max-image-tokens", "60", "--skip-broken")
    arguments = ("evaluate", "--tasks", mine, "--model", tiny_model_dir, *plans)
    results = run_json(*arguments)["results"]
    assert [(result["plan"], result["questions"]) for result in results] == [("s2", 2), ("s4", 2), ("max60", 2)]
    one = run_json("evaluate", "--tasks", mine, "--model", tiny_model_dir, "--scale-factor", "4", *plans[2:])
    assert [result["plan"] for result in one["results"]] == ["s4-max60"]
    kept = run(*arguments, "--out", tmp_path / "out")
    assert kept.exit_code == 0, kept.output
    assert (tmp_path / "out" / "report.html").is_file()
    again = run_json(*arguments, "--out", tmp_path / "out")
    assert [result | {"seconds": 0} for result in again["results"]] == [result | {"seconds": 0} for result in results]
    compared = run("evaluate", "--compare", tmp_path / "out", tmp_path / "out", "--out", tmp_path / "page.html")
    assert compared.exit_code == 0, compared.output
    assert (tmp_path / "page.html").is_file()


def test_our_tasks_go_into_a_folder_too(run, tiny_model_dir, tmp_path):
    result = run("evaluate", "--tasks", "small", "--model", tiny_model_dir, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("small own: accuracy 0.0 (95 % interval 0.0 to 65.8), 4 questions")
    assert len((tmp_path / "out" / "answers" / "small" / "own.jsonl").read_text().splitlines()) == 4


def test_ctrl_c_with_a_folder_goes_on_with_the_same_command(run, mine, tiny_model_dir, stopped_after, tmp_path):
    stopped_after(0)
    arguments = ("evaluate", "--tasks", mine, "--model", tiny_model_dir)
    for more, text in ((("--out", tmp_path / "out"), "the same command goes on"), ((), "with --out FOLDER, the same")):
        result = run(*arguments, *more)
        assert result.exit_code == 130
        assert result.stdout.startswith(
            "mine own: accuracy 0.0 (95 % interval 0.0 to 79.3), 1 of 3 questions, 1 of them"
        )
        assert result.stderr.splitlines()[-1].startswith(f"stopped; {text}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tasks", "small", "--data", "hub"), "--data is for benchmarks, FILE.jsonl or --out; leave it out"),
        (("--tasks", "small", "--out", "x", "--data", "hub"), "--data is for benchmarks; leave it out"),
        (("--tasks", "pope", "--data", "x", "--metric", "exact"), "--metric is for FILE.jsonl; a benchmark has its"),
        (("--tasks", "pope"), "task pope needs its files; give --data DIR"),
        (("--tasks", "pope", "--data", "x.jsonl"), "--data x.jsonl is a file; give the folder"),
        (("--data", "x.jsonl"), "--data x.jsonl is a file; give the folder"),
        (
            ("--tasks", "popee", "--data", "x"),
            "task 'popee' is unknown; use a file that ends in .jsonl, or some of: small",
        ),
        (("--tasks", "x.jsonl"), "the task x.jsonl is not there"),
        (("--tasks", "pope", "--data", "x", "--overwrite"), "--overwrite needs --out"),
        (
            ("--tasks", "small", "--scale-factor", "2,x"),
            "--scale-factor x must be at least 1, or auto",
        ),
        (("--tasks", "small", "--scale-factor", "2,99"), "scale_factor=99"),
        (("--compare", "a", "b", "--limit", "3"), "--limit has no effect with --compare; leave it out"),
        (("--compare", "a", "b", "--batch-size", "3"), "--batch-size has no effect with --compare; leave it out"),
        (("--tasks", "small", "--out", "x", "--protocol", "short"), "--protocol is for benchmarks and FILE.jsonl"),
        (("--compare", "a", "b", "--out", "page.png"), "--out page.png must end in .html"),
        (("--compare", "a", "b"), "a has no results.json"),
    ],
)
def test_wrong_options_are_refused_before_the_model_is_loaded(one_line_error, monkeypatch, arguments, message):
    monkeypatch.setattr("tokenpacker.cli.commands.evaluate.load_model", None)
    assert one_line_error("evaluate", *arguments).startswith(message)
