"""Two runs compared."""

import json
import re

import pytest

from browser import DESKTOP, PHONE, assert_accessible, assert_fits
from made_up_results import MadeUpRun, answers
from page_reader import PageReader
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.results import results_comparison
from tokenpacker.evaluate.results.results_comparison import compare_results
from tokenpacker.evaluate.results.results_folder import AskedTask

PLAN = Plan(scale_factor=2)


@pytest.fixture
def written(tmp_path, signs, read_data):
    """Writes a run: `written("a", said)`."""
    read_data(signs=signs)

    def write(name, said, plan=PLAN, task="signs", metric="exact", questions=signs, **content):
        run = MadeUpRun(tmp_path / name, f"model-{name}")
        run.task(task, metric, questions, **content)
        run.plan(plan, said)
        return run.write()

    return write


@pytest.fixture
def pair(written, signs):
    """Two runs: B loses sign-8 and sign-9, and gains sign-0, sign-1 and sign-2."""
    later = {each.id: ("go", 0.0) if each.id in ("sign-3", "sign-8", "sign-9") else ("stop", 1.0) for each in signs}
    return written("a", answers(signs, 4)), written("b", later)


def test_a_line_tells_the_difference_and_what_changed(pair):
    comparison = compare_results(*pair)
    (change,) = comparison.changes
    assert (change.numbers, change.difference) == ((80.0, 85.0), 5.0)
    assert (change.gained, change.lost) == (["sign-0", "sign-1", "sign-2"], ["sign-8", "sign-9"])
    assert change.is_noise
    first, second, line = comparison.lines()
    assert first.endswith("a: model-a")
    assert second.endswith("b: model-b")
    assert re.fullmatch(
        r"signs, s2: accuracy 80\.0 -> 85\.0, \+5\.0 \(95 % interval -\d+\.\d to \+\d+\.\d: within noise\);"
        r" 3 gained, 2 lost of 20 questions",
        line,
    )


def test_a_program_reads_the_same(pair):
    content = json.loads(json.dumps(compare_results(*pair).to_dict()))
    (change,) = content["changes"]
    assert (change["task"], change["plans"], change["shared"]) == ("signs", ["s2", "s2"], 20)
    assert (change["numbers"], change["difference"]) == ([80.0, 85.0], 5.0)
    assert change["interval_95"][0] < 0 < change["interval_95"][1]
    assert change["lost"] == ["sign-8", "sign-9"]


def test_a_run_equals_itself(pair):
    comparison = compare_results(pair[0], pair[0])
    assert comparison.changes[0].interval == (0.0, 0.0)
    assert "0 gained, 0 lost of 20 questions" in comparison.lines()[-1]


def test_many_gains_are_more_than_noise(written, signs):
    change = compare_results(written("a", answers(signs, 15)), written("b", answers(signs, 2))).changes[0]
    assert not change.is_noise
    assert "more than noise" in change.line()


@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_shows_what_changed(pair, tmp_path, open_page, window, scheme):
    path = compare_results(*pair).write(tmp_path / "new folder" / "page.html")
    text = path.read_text(encoding="utf-8")
    reader = PageReader(text)
    assert reader.open_tags == []
    assert all(reference.startswith(("data:image/", "#")) for reference in reader.references)
    assert len(text.split("<article")) - 1 == 5
    assert text.count("data:image/jpeg") == 5
    page = open_page(path, window, color_scheme=scheme)
    assert_fits(page)
    assert_accessible(page)
    assert page.locator("h3").all_inner_texts() == ["Lost in B: 2", "Gained in B: 3"]


def test_only_shared_questions_are_compared(written, signs):
    said = answers(signs, 4)
    some = {id: said[id] for id in list(said)[:10]}
    comparison = compare_results(written("a", said), written("b", some))
    (change,) = comparison.changes
    assert (change.shared, change.numbers) == (10, (60.0, 60.0))
    assert "  note: 10 questions are in one run alone; they are left out" in comparison.lines()


def test_a_question_with_other_references_is_another_one(written, signs, monkeypatch):
    others = [BenchQuestion(id="sign-0", text="?", answers=("x",)), *signs[1:]]

    def ask_again(task):
        return AskedTask(written_metric, {each.id: each for each in (signs if task.data == "a" else others)})

    from tokenpacker.evaluate.metrics import find_metric

    written_metric = find_metric("exact")
    monkeypatch.setattr(results_comparison, "ask_again", ask_again)
    runs = (written(name, answers(signs, 4), data=name) for name in "ab")
    change = compare_results(*runs).changes[0]
    assert change.shared == 19
    assert change.notes == [
        "data differs: a in A, b in B",
        "1 ids belong to other questions in B, or to none now; they are left out",
    ]


def test_other_protocols_are_named(written, signs):
    runs = written("a", answers(signs, 4), protocol="paper"), written("b", answers(signs, 4), protocol="no-ocr")
    assert compare_results(*runs).changes[0].notes == ["protocol differs: paper in A, no-ocr in B"]


def test_single_plans_are_compared_whatever_they_are(written, signs):
    runs = written("a", answers(signs, 4)), written("b", answers(signs, 6), Plan(scale_factor=4))
    (change,) = compare_results(*runs).changes
    assert change.name == "signs, s2 against s4"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"task": "others"}, "only one run has the task others; only one run has the task signs"),
        ({"metric": "contains"}, r"signs: the metrics differ \(exact, contains\), so nothing is compared"),
        ({"said": {"x": ("go", 0.0)}}, "signs: no question is shared under s2, so nothing is compared"),
        ({"said": {"sign-0": ("go", None)}}, "signs: no score is shared under s2, so nothing is compared"),
    ],
)
def test_runs_that_share_nothing_are_refused(written, signs, other, told):
    questions = [*signs, BenchQuestion(id="x", text="?", answers=("stop",))]
    second = {"said": answers(signs, 4), "questions": questions, **other}
    with pytest.raises(ValueError, match=f"a and .*b have nothing to compare: {told}") as error:
        compare_results(written("a", answers(signs, 4)), written("b", **second))
    assert "\n" not in str(error.value)


def test_without_data_mean_scores_are_compared(pair, monkeypatch, tmp_path):
    monkeypatch.setattr(results_comparison, "ask_again", lambda task: AskedTask(missing="signs.json does not exist"))
    comparison = compare_results(*pair)
    (change,) = comparison.changes
    assert (change.headline, change.numbers) == ("mean score", (80.0, 85.0))
    assert "the data cannot be read (signs.json does not exist): compared are mean scores" in change.notes[0]
    text = comparison.write(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "No pictures: the data cannot be read (signs.json does not exist)." in text
    assert "Prompt of sign-0" in text
