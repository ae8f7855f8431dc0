"""Own questions from a file: what is read, and what is listed as wrong."""

from __future__ import annotations

import pytest

from tokenpacker.evaluate.bench_tasks import find_bench
from tokenpacker.evaluate.own_task import load_own

PLAIN = {"image": "one.png", "question": "what?", "answer": "cat"}


def test_a_row_is_a_question_about_images_beside_the_file(own_file, tmp_path):
    row = {"image": ["one.png", "seven.png"], "question": "which?", "answers": ["a", "b"], "id": 7, "category": "x"}
    first, second = load_own(own_file(PLAIN, row)).questions
    assert (first.id, first.text, first.answers) == ("1", "what?", ("cat",))
    assert first.images == (str(tmp_path / "one.png"),)
    assert (second.id, second.answers, second.category) == ("7", ("a", "b"), "x")
    assert [picture.size for picture in second.open_images()] == [(32, 32), (96, 64)]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(own_file):
    path = own_file(PLAIN, "", PLAIN)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    loaded = load_own(path)
    assert [question.id for question in loaded.questions] == ["1", "3"]
    assert loaded.problems == ()


@pytest.mark.parametrize("answer", ["b", "B", "a dog"])
def test_an_option_is_named_by_letter_or_text(own_file, answer):
    bench = find_bench(str(own_file({**PLAIN, "options": ["a cat", "a dog"], "answer": answer, "hint": "Look."})))
    (question,) = bench.loaded.questions
    assert question.answers == ("B", "a dog")
    asked = "Look.\nwhat?\nA. a cat\nB. a dog\nAnswer with the option's letter from the given choices directly."
    assert bench.protocol.prompt(question) == asked


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("{", "no JSON in UTF-8"),
        ("[1]", "no JSON object"),
        ({**PLAIN, "image": None}, "image is missing"),
        ({**PLAIN, "image": []}, "image is missing"),
        ({**PLAIN, "question": 3}, "question is 3; give a text that is not blank"),
        ({**PLAIN, "question": " "}, "question is"),
        ({**PLAIN, "answers": ["x"]}, "answer and answers exclude each other"),
        ({"image": "one.png", "question": "what?"}, "answer is missing"),
        ({**PLAIN, "answer": {"a": 1}}, "answer is"),
        ({**PLAIN, "options": ["x", "y"], "answer": "z"}, "none of the 2 options"),
        ({**PLAIN, "id": "\ud83d"}, "half a character"),
        ({**PLAIN, "question": "<image> what?"}, "images stand before it"),
    ],
)
def test_a_malformed_row_is_listed_and_counted(own_file, row, text):
    loaded = find_bench(str(own_file(PLAIN, row))).loaded
    assert [question.is_broken for question in loaded.questions] == [False, True]
    (problem,) = loaded.problems
    assert problem.kind == "malformed row"
    assert text in problem.text


def test_missing_images_and_repeated_ids_are_listed_and_counted(own_file):
    again, lost = {**PLAIN, "id": "a"}, {**PLAIN, "image": "gone.png"}
    loaded = load_own(own_file(again, again, lost))
    assert [(question.id, question.is_broken) for question in loaded.questions] == [
        ("a", False),
        ("a (2)", False),
        ("3", True),
    ]
    assert [(problem.kind, problem.where) for problem in loaded.problems] == [
        ("duplicate id", "a"),
        ("missing image", "3"),
    ]


def test_a_file_without_any_question_that_can_be_asked_is_refused(own_file, tmp_path):
    with pytest.raises(ValueError, match="is not there"):
        find_bench(str(tmp_path / "gone.jsonl"))
    with pytest.raises(ValueError, match="has no questions"):
        find_bench(str(own_file("")))
    with pytest.raises(ValueError, match=r"none of the 1 questions of mine can be asked, such as 1: the image .*gone"):
        find_bench(str(own_file({**PLAIN, "image": "gone.png"})))


def test_a_metric_that_cannot_score_the_answers_is_refused(own_file):
    with pytest.raises(ValueError, match=r"cannot be 1 with fewer than 4"):
        find_bench(str(own_file(PLAIN)), metric="vqa")
    assert find_bench(str(own_file(PLAIN)), metric="contains").metric.name == "contains"


def test_the_task_is_found_again_by_what_a_run_says(own_file):
    bench = find_bench(str(own_file(PLAIN)))
    said = {"data": bench.data, "protocol": bench.protocol.name, "metric": bench.metric.name}
    assert find_bench(bench.name, split=bench.loaded.split, **said) == bench
