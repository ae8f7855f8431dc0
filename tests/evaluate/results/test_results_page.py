"""The page of results."""

import json
import re
from html import unescape

import pytest
from PIL import Image, ImageColor

from browser import DESKTOP, PHONE, assert_accessible, assert_fits
from made_up_results import MadeUpRun, answers
from page_reader import PageReader
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.results.elastic_curve import KINDS, LIGHT, curve_table
from tokenpacker.evaluate.results.results_folder import ResultsFolder
from tokenpacker.evaluate.results.results_page import write_report

HOSTILE = "<script>alert('x')</script>\u202e{{ 7 * 7 }} \x00" + "W" * 2000


def text_of(page: str) -> str:
    """The page without tags and pictures, in one line."""
    return " ".join(unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)).split())


def one_plan(path, questions, said, name="signs", **content) -> MadeUpRun:
    run = MadeUpRun(path)
    run.task(name, "exact", questions, **content)
    run.plan(Plan(scale_factor=2), said)
    return run


@pytest.mark.parametrize("window", [PHONE, DESKTOP], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_read_on_every_screen(report, open_page, window, scheme):
    page = open_page(report, window, color_scheme=scheme)
    assert_fits(page)
    for summary in page.locator("summary").all():
        summary.click()
    assert_fits(page)
    assert_accessible(page)
    sizes = "[...document.querySelectorAll('main *')].map(element => parseFloat(getComputedStyle(element).fontSize))"
    assert min(page.evaluate(sizes)) >= 16
    drawn = page.evaluate("document.querySelector('.curve img').currentSrc")
    light, dark = (page.get_attribute(f".curve {tag}", name) for tag, name in (("img", "src"), ("source", "srcset")))
    assert drawn == (dark if scheme == "dark" else light)


def test_the_page_holds_everything_and_loads_nothing(report):
    page = report.read_text(encoding="utf-8")
    reader = PageReader(page)
    assert reader.open_tags == []
    assert not {"script", "link", "iframe"} & set(reader.tags)
    assert all(reference.startswith(("data:image/", "#")) for reference in reader.references)
    style = page[page.index("<style>") : page.index("</style>")]
    assert not re.search(r"url\(|@import|http", style)


def test_each_plan_has_its_score_interval_and_counts(report):
    text = text_of(report.read_text(encoding="utf-8"))
    interval = r"[\d.]+ to [\d.]+"
    assert re.search(rf"s2 95\.0 {interval} 400\.0 20 0 [\d.]+ scale factor 2", text)  # 1 of 20 wrong
    assert re.search(rf"s4 70\.0 {interval} 90\.0 20 0 [\d.]+ scale factor 4", text)
    assert re.search(rf"max120 75\.0 {interval} 120\.0 20 0 [\d.]+ at most 120 tokens an image", text)
    assert "accuracy/number 100.0 90.0 90.0 80.0 70.0" in text  # by split, most tokens first
    lines = curve_table(ResultsFolder(report.parent)).splitlines()
    assert lines[2].startswith("| signs, accuracy | scale factor 2 | 400.0 | 95.0 | ")
    assert (report.parent / "curve.md").read_text() == "\n".join(lines) + "\n"


def test_the_curve_is_also_a_picture(report):
    picture = Image.open(report.parent / "curve.png")
    assert picture.size == (2880, 800)  # a panel for each task
    assert len(picture.convert("RGB").getcolors(1 << 24)) > 10


def test_auto_is_drawn_apart_from_the_scale_factors(tmp_path, signs, read_data):
    read_data(signs=signs)
    run = MadeUpRun(tmp_path)
    run.task("signs", "exact", signs)
    for plan, wrong in (
        (Plan(scale_factor=2), 2),
        (Plan(scale_factor=4), 6),
        (Plan(scale_factor="auto", max_image_tokens=60), 3),
    ):
        run.plan(plan, answers(signs, wrong))
    write_report(run.write())
    with Image.open(tmp_path / "curve.png") as picture:
        drawn = {color for _, color in picture.convert("RGB").getcolors(1 << 24)}
    colors = {kind: ImageColor.getrgb(getattr(LIGHT, kind)) in drawn for kind in KINDS}
    assert colors == {"auto": True, "budget": False, "factor": True}


def test_the_examples_are_what_fewer_tokens_lose(report):
    page = report.read_text(encoding="utf-8")
    assert "Right with s2, lost with s4" in page
    first = page.split("<article")[1:6]  # sign-0 is wrong with both
    assert [re.search(r"on sign (\d+)", card)[1] for card in first] == ["1", "2", "3", "4", "5"]
    assert "References: stop" in text_of(first[0])
    assert "Prompt of sign-1" in first[0]
    assert first[0].count("data:image/jpeg;base64,") == 1
    assert re.findall(r"(s\d|max\d+) (stop|go)", text_of(first[0])) == [
        ("s2", "stop"), ("max240", "go"), ("s3", "go"), ("max120", "go"), ("s4", "go")
    ]  # fmt: skip


def test_one_plan_shows_its_worst_answers_once_for_each_image(tmp_path, signs, read_data):
    same = [BenchQuestion(id=f"more-{n}", text="?", images=signs[0].images, answers=("stop",)) for n in range(5)]
    read_data(signs=signs + same)
    said = answers(signs, 3) | {each.id: ("go", 0.0) for each in same}
    said["sign-5"] = ("st", 0.5)
    page = write_report(one_plan(tmp_path, signs + same, said).write()).read_text(encoding="utf-8")
    assert "Worst answers" in page
    assert len(page.split("<article")) - 1 == 4  # sign-0 stands for those about its picture
    assert "0.50" in page.split("<article")[4]


def test_a_published_score_beyond_the_interval_names_the_choices(report):
    text = text_of(report.read_text(encoding="utf-8"))
    assert "multi-level arXiv 2407.02392, ablation, 7B 144 57.2 85.0 (s3) +27.8 *" in text
    assert "TokenPacker-HD arXiv 2407.02392, ablation, 7B 954 64.0 95.0 (s2) +31.0 *" in text
    assert "words of an OCR system are in the prompt" in text
    assert "yours is no-ocr; published numbers follow paper" in text
    assert "problems: 1; questions that cannot be asked count as wrong" in text


def test_a_published_score_within_the_interval_needs_no_choices(tmp_path, signs, read_data):
    read_data(textvqa=signs)
    said = answers(signs, 8)  # 60 %, the interval is wide
    text = text_of(write_report(one_plan(tmp_path, signs, said, "textvqa").write()).read_text(encoding="utf-8"))
    assert "57.2 60.0 (s2) +2.8 " in text
    assert "More than noise" not in text


def test_an_own_file_named_as_a_benchmark_has_no_published_numbers(tmp_path, signs, read_data):
    read_data(textvqa=signs)
    run = one_plan(tmp_path, signs, answers(signs, 1), "textvqa", data="/data/textvqa.jsonl")
    assert "2407.02392" not in write_report(run.write()).read_text(encoding="utf-8")


def test_what_only_a_server_scores_stands_beside_the_published_numbers(tmp_path, signs, read_data):
    read_data(vizwiz=signs)
    run = one_plan(tmp_path, signs, {each.id: ("stop", None) for each in signs}, "vizwiz")
    text = text_of(write_report(run.write()).read_text(encoding="utf-8"))
    assert "not scored here" in text
    assert (
        "token-packer arXiv 2407.02392, projectors compared on LLaVA-1.5's data (558K + 665K), 7B 144 52.0 - -" in text
    )
    assert not (tmp_path / "curve.png").exists()


def test_hostile_texts_are_shown_as_they_are(tmp_path, read_data, image_of, open_page):
    question = BenchQuestion(id=HOSTILE, text=HOSTILE, images=(image_of(9, 9),), answers=(HOSTILE,))
    read_data(**{"a & <b>": [question]})
    problem = {"kind": HOSTILE, "where": HOSTILE, "text": HOSTILE}
    run = one_plan(tmp_path, [question], {HOSTILE: (HOSTILE, 0.0)}, "a & <b>", problems=[problem], source=HOSTILE)
    run.content["model"] = HOSTILE
    page = write_report(run.write())
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<b>" not in text
    assert "{{ 7 * 7 }}" in text
    assert_fits(open_page(page, PHONE))


def test_data_that_are_gone_are_named_in_place_of_pictures(elastic):
    page = write_report(elastic).read_text(encoding="utf-8")
    assert "data:image/jpeg" not in page
    assert "No pictures: the data cannot be read" in page
    assert "Prompt of sign-1" in page


def test_a_picture_that_is_gone_is_named(tmp_path, read_data):
    question = BenchQuestion(id="1", text="?", images=(str(tmp_path / "no.png"),), answers=("stop",))
    read_data(signs=[question])
    page = write_report(one_plan(tmp_path, [question], {"1": ("go", 0.0)}).write()).read_text(encoding="utf-8")
    assert f"No picture: {tmp_path / 'no.png'} does not exist" in page


def test_many_large_pictures_stay_below_5_mb(tmp_path, image_of, read_data):
    questions = [BenchQuestion(id=f"{n}", text="W" * 5000, images=(image_of(448, 448, seed=n),)) for n in range(12)]
    run = MadeUpRun(tmp_path)
    for task in range(3):
        run.task(f"task-{task}", "exact", questions)
        run.plan(Plan(scale_factor=2), {each.id: ("W" * 9000, 0.0) for each in questions})
    read_data(**{f"task-{task}": questions for task in range(3)})
    page = write_report(run.write())
    assert page.stat().st_size < 5_000_000
    text = page.read_text(encoding="utf-8")
    assert "No picture: the page would grow beyond 5 MB." in text
    last = text.split("<h2")[-1]
    assert "data:image/jpeg" in last  # the first tasks do not take it all


def test_broken_questions_are_counted_and_listed_but_no_example(tmp_path, signs, read_data):
    read_data(signs=signs)
    problems = [{"kind": "malformed row", "where": f"line {n}", "text": "no question"} for n in range(60)]
    said = answers(signs, 0) | {"sign-0": (None, 0.0)}
    page = write_report(one_plan(tmp_path, signs, said, problems=problems).write()).read_text(encoding="utf-8")
    text = text_of(page)
    assert re.search(r"95\.0 [\d.]+ to [\d.]+ [\d.]+ 20 1 1\.5", text)  # questions, broken ones, seconds
    assert "malformed row, line 49: no question 10 more are in run.json" in text
    assert "<article" not in page


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda path: (path / "results.json").unlink(), "has no results.json; give a folder that tokenpacker evaluate"),
        (lambda path: (path / "results.json").write_text("{"), "is no file of results (its JSON: "),
        (lambda path: (path / "results.json").write_text("[]"), "is no file of results (its JSON: "),
        (lambda path: (path / "results.json").write_text('{"results": []}'), "(run: Field required)"),
        (lambda path: edit(path, lambda content: content["run"].update(format=2)), "(run.format: Input should be 1)"),
        (lambda path: edit(path, lambda content: content["run"].update(tasks=[])), "is no task of its run"),
        (
            lambda path: edit(path, lambda content: content["results"][0].update(plan="../../../x")),
            "is outside of",
        ),
        (
            lambda path: (path / "answers/signs/s2.jsonl").unlink(),
            "s2.jsonl is missing; call tokenpacker evaluate again",
        ),
        (lambda path: (path / "answers/signs/s2.jsonl").write_text('{"id": 1}\n'), "s2.jsonl, line 1 is no answer"),
    ],
)
def test_a_folder_of_something_else_is_an_error_in_one_line(elastic, damage, told):
    damage(elastic)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        write_report(elastic)
    assert "\n" not in str(error.value)


def edit(path, change) -> None:
    content = json.loads((path / "results.json").read_text())
    change(content)
    (path / "results.json").write_text(json.dumps(content))
