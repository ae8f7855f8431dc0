"""What is wrong with a benchmark's files is listed and counted, or ends the run with one line."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tokenpacker.evaluate.layouts import load_benchmark
from tokenpacker.evaluate.layouts.llava import load_llava

GOOD = {"question_id": 1, "image": "a.jpg", "text": "Why?", "category": "default"}
PICTURES = {"mm-vet/images/a.jpg": None}
QUESTIONS = "mm-vet/llava-mm-vet.jsonl"


def lines(*rows):
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ('{"question_id": 2, "image": "a.j', "no valid JSON at column"),
        ("[1, 2]", "the row is a list; an object with 'text' is due"),
        ('{"question_id": 2, "image": "a.jpg"}', "'text' is missing; fetch the file again"),
        ('{"question_id": 2, "image": "a.jpg", "text": ["x"]}', "'text' is a list; text is due"),
        ('{"question_id": null, "image": "a.jpg", "text": "x"}', "'question_id' is missing"),
        ('{"question_id": true, "image": "a.jpg", "text": "x"}', "'question_id' is a bool"),
        ('{"question_id": 2, "image": {}, "text": "x"}', "'image' is a dict"),
        ('{"question_id": 2, "image": "a.jpg", "text": "\\ud800"}', "'text' has half a character"),
        ("[" * 100_000, "no usable JSON"),
    ],
)
def test_a_malformed_row_counts_as_wrong_and_names_file_and_line(bad, reason, put):
    loaded = load_benchmark("mm-vet", put(PICTURES | {QUESTIONS: lines(GOOD, "", bad)}))
    (problem,) = loaded.problems
    assert problem.kind == "malformed row"
    assert problem.where == "llava-mm-vet.jsonl, line 3"
    assert reason in problem.text
    assert "\n" not in problem.text
    assert [question.id for question in loaded.questions] == ["1", "llava-mm-vet.jsonl, line 3"]
    assert loaded.questions[1].extra["problem"] == problem.text


def test_missing_images_and_repeated_ids_are_listed(put):
    rows = lines(GOOD, GOOD, {**GOOD, "question_id": 2, "image": "lost.jpg"})
    loaded = load_benchmark("mm-vet", put(PICTURES | {QUESTIONS: rows}))
    assert [problem.kind for problem in loaded.problems] == ["duplicate id", "missing image"]
    assert [question.id for question in loaded.questions] == ["1", "1 (2)", "2"]
    assert "lost.jpg" in loaded.questions[2].extra["problem"]


def test_a_question_without_its_reference_is_listed_and_keeps_its_split(put):
    data = put(
        {
            "pope/llava_pope_test.jsonl": [{**GOOD, "category": "random"}],
            "pope/coco/coco_pope_random.json": [{"image": "other.jpg", "text": "Why?", "label": "yes"}, 7],
            "pope/val2014/a.jpg": None,
        }
    )
    loaded = load_benchmark("pope", data)
    (question,) = loaded.questions
    assert question.category == "random"
    assert "coco_pope_random.json has no reference for it" in loaded.problems[0].text


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("mm-vet", {QUESTIONS: lines(GOOD)}, r"jsonl is there, but its images are not; put them at .*images"),
        ("gqa", {"gqa/llava_gqa_testdev_balanced.jsonl": lines(GOOD), "gqa/data/images/a.jpg": None},
         "but its references are not; put them at .*testdev_balanced_questions.json or "),
        ("gqa", {"gqa/llava_gqa_testdev_balanced.jsonl": lines(GOOD), "gqa/data/images/a.jpg": None,
                 "gqa/data/testdev_balanced_questions.json": '{"1": {"answ'},
         "is no valid JSON after .*; fetch it again"),
        ("ocrbench", {"ocr_bench/OCRBench.json": '[{"question": "x"}', "ocr_bench/OCRBench_Images/a.jpg": None},
         "OCRBench.json is no valid JSON"),
        ("docvqa", {"docvqa/data/test_v1.0.json": {"other": []}, "docvqa/images/a.jpg": None},
         "has no list 'data' with entries"),
        ("chartqa", {"chartqa/test/test_human.json": [{"imgname": "a", "query": "b", "label": "c"}],
                     "chartqa/test/png/a.png": None},
         "test_augmented.json is missing; ChartQA's score is of both halves"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole_are_an_error_in_one_line(name, files, message, put):
    with pytest.raises(ValueError, match=message) as caught:
        load_benchmark(name, put(files))
    assert "\n" not in str(caught.value)


def test_mmbench_rows_are_checked_one_by_one(put):
    rows = [
        "index\tquestion\tA\tB\timage",
        "1\tWhy?\tx\ty\tno base64",
        "2\tWhy?\tx\ty\t99",
        "3\tWhy?\tnan\ty\tAAAA",
        "4\tWhy?\tx\ty\tAAAA\tmore",
        "5\tWhy?",
    ]
    loaded = load_benchmark("mmbench", put({"mmbench/mmbench_dev_20230712.tsv": "\n".join(rows)}))
    reasons = ["no base64", "index 99, which no row before it has", "no options", "more cells", "'image' is missing"]
    assert [problem.where for problem in loaded.problems] == [
        f"mmbench_dev_20230712.tsv, line {number}" for number in range(2, 7)
    ]
    for problem, reason in zip(loaded.problems, reasons, strict=True):
        assert reason in problem.text


def test_nothing_found_names_both_layouts_and_the_command(tmp_path):
    with pytest.raises(ValueError, match="tokenpacker data get pope") as caught:
        load_benchmark("pope", tmp_path)
    assert str(tmp_path / "pope" / "llava_pope_test.jsonl") in str(caught.value)
    assert "Parquet" in str(caught.value)
    with pytest.raises(ValueError, match=r"vqav2, split val,.*v2_OpenEnded_mscoco_val2014_questions\.json"):
        load_benchmark("vqav2", tmp_path, split="val")
    with pytest.raises(ValueError, match="is no folder"):
        load_benchmark("pope", tmp_path / "missing")


VALUES = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=5), st.lists, max_leaves=4)
KEYS = st.sampled_from(["question_id", "id", "image", "text", "conversations", "category", "index"])


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(KEYS, VALUES, max_size=5) | VALUES, min_size=1, max_size=4))
@pytest.mark.parametrize("name", ["mm-vet", "scienceqa"])
def test_any_rows_are_questions_or_problems(name, rows, put):
    files = {
        "mm-vet": {QUESTIONS: lines(*(json.dumps(row) for row in rows))} | PICTURES,
        "scienceqa": {
            "scienceqa/llava_test_CQM-A.json": rows,
            "scienceqa/problems.json": {"1": {"question": "?"}, "2": 3},
            "scienceqa/images/test/a.jpg": None,
        },
    }[name]
    loaded = load_llava(name, put(files))
    assert len(loaded.questions) == len(rows)
    assert all(question.extra.get("problem") or question.text for question in loaded.questions if name == "scienceqa")
