"""Each server's file has exactly the form that the server takes."""

import json
import re
import sys
import zipfile
from pathlib import Path

import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.layouts.loaded import broken_question
from tokenpacker.evaluate.submissions import SUBMISSIONS, write_submission


def question(id, image="a.jpg", **extra):
    answers = extra.pop("answers", ())
    return BenchQuestion(id=id, text="What?", images=(Path("vqav2/test2015") / image,), answers=answers, extra=extra)


def written(benchmark, folder, questions, answers):
    """The file's text, for questions among which are a malformed row and a second use of an id."""
    broken, _ = broken_question("file, line 9", "no valid JSON")
    path = write_submission(benchmark, folder / "new", [*questions, question("1 (2)", repeated=True), broken], answers)
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("benchmark", "ids", "answers", "text"),
    [
        ("vqav2", ["1", "2"], {"1": "Two dogs."},
         '[{"question_id": 1, "answer": "2 dogs"}, {"question_id": 2, "answer": ""}]'),
        ("vizwiz", ["1"], {"1": "The can"}, '[{"image": "a.jpg", "answer": "can"}]'),
        ("docvqa", ["57344"], {"57344": "0.28."}, '[{"questionId": 57344, "answer": "0.28"}]'),
        ("mm-vet", ["0", "v1_1"], {"0": "É", "v1_1": "b"}, '{\n  "v1_0": "\\u00c9",\n  "v1_1": "b"\n}'),
        ("seed", ["101669"], {"101669": "A"}, '{"question_id": "101669", "prediction": "A"}\n'),
    ],
)  # fmt: skip
def test_the_file_has_the_servers_form(benchmark, ids, answers, text, tmp_path):
    assert written(benchmark, tmp_path, [question(id) for id in ids], answers) == text


def test_mmmu_has_letters_and_open_answers(tmp_path):
    questions = [question("test_Art_1", options=["x", "y"]), question("test_Art_2"), question("test_Art_3")]
    text = written("mmmu", tmp_path, questions, {"test_Art_1": "The answer is (B).", "test_Art_2": " 4 "})
    assert json.loads(text) == {"test_Art_1": "B", "test_Art_2": "4", "test_Art_3": ""}


def test_vqav2_lists_all_of_test2015_where_llavas_file_for_it_lies(tmp_path):
    """As LLaVA's converter: the server wants all questions of test2015, and scores those of test-dev."""
    lines = "".join(f'{{"question_id": {id}, "image": "a.jpg", "text": "x"}}\n' for id in (3, 1))
    (tmp_path / "llava_vqav2_mscoco_test2015.jsonl").write_text(lines)
    asked = BenchQuestion(id="1", text="What?", images=(tmp_path / "test2015" / "a.jpg",))
    path = write_submission("vqav2", tmp_path, [asked], {"1": "a cat"}, name="vqav2-s2")
    assert path == tmp_path / "vqav2-s2.json"
    assert json.loads(path.read_text()) == [{"question_id": 3, "answer": ""}, {"question_id": 1, "answer": "cat"}]


def test_vizwiz_takes_the_image_from_the_hubs_id(tmp_path):
    asked = BenchQuestion(id="VizWiz_test_00000000", text="What?", images=(b"png",))
    path = write_submission("vizwiz", tmp_path, [asked], {asked.id: "can"})
    assert json.loads(path.read_text()) == [{"image": "VizWiz_test_00000000.jpg", "answer": "can"}]


@pytest.mark.parametrize(
    ("answers", "columns"),
    [((), ["index", "question", *"ABCD", "prediction", "split"]),
     (("A",), ["index", "question", *"ABCD", "prediction", "answer", "split"])],
)  # fmt: skip
def test_mmbench_has_llavas_columns(answers, columns, tmp_path):
    pytest.importorskip("xlsxwriter", reason="pip install 'tokenpacker[metrics]'")
    questions = [
        question("5", options=["x", "=1+1"], split="dev", answers=answers),
        question("6", options=["x", "y"], split="dev", answers=answers),
    ]
    path = write_submission("mmbench", tmp_path, questions, {"5": "B", "6": "http://a.b"})
    cells = sheet(path)
    assert [cell for cell in cells[0] if cell] == columns
    row = [5, "What?", "x", "=1+1", None, None, "B", *answers, "dev"]
    assert cells[1] == row
    assert cells[2][6] == "http://a.b"


def sheet(path):
    """Rows of a workbook's first sheet: numbers, texts, and None for empty cells."""
    with zipfile.ZipFile(path) as book:
        strings = re.findall(r"<t[^>]*>([^<]*)</t>", book.read("xl/sharedStrings.xml").decode())
        content = book.read("xl/worksheets/sheet1.xml").decode()
    assert "hyperlink" not in content
    rows = []
    for row in re.findall(r"<row [^>]*>(.*?)</row>", content):
        cells = {}
        for column, attributes, value in re.findall(r'<c r="([A-Z])\d+"([^>]*)><v>([^<]*)</v>', row):
            cells[column] = strings[int(value)] if 't="s"' in attributes else int(value)
        rows.append([cells.get(column) for column in "ABCDEFGHI"[: ord(max(cells)) - ord("A") + 1]])
    return rows


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "xlsxwriter", None)
    with pytest.raises(ModuleNotFoundError, match=r"xlsxwriter; run: pip install 'tokenpacker\[metrics\]'"):
        write_submission("mmbench", tmp_path, [question("1", options=["x", "y"])], {})


def test_benchmarks_that_are_scored_here_have_no_file(tmp_path):
    assert write_submission("pope", tmp_path, [question("1")], {}) is None
    assert list(tmp_path.iterdir()) == []
    assert set(SUBMISSIONS) == {"vqav2", "vizwiz", "docvqa", "mm-vet", "mmmu", "seed", "mmbench"}
