"""A task by its name."""

from __future__ import annotations

import pytest
from PIL import Image

from tokenpacker.evaluate import Task
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.bench_tasks import find_bench
from tokenpacker.evaluate.layouts.loaded import Loaded
from tokenpacker.scenes import Question, Sample


@pytest.fixture
def files(monkeypatch):
    """Gives the questions of a benchmark without its files."""

    def give(*questions: BenchQuestion) -> None:
        monkeypatch.setattr(
            "tokenpacker.evaluate.layouts.load_benchmark", lambda name, data, split: Loaded(questions=questions)
        )

    return give


def test_a_task_of_ours_has_its_samples_as_questions(monkeypatch, image_of):
    questions = (Question("what is <mask>?", "cat", "noun", (1,)), Question("how many?", "2", "number"))
    sample = Sample(name="a.png", image=image_of(30, 40), questions=questions, caption="", regions=("first", "second"))
    task = Task(name="small", description="made up", load=lambda: [sample], max_new_tokens=3)
    monkeypatch.setattr("tokenpacker.evaluate.tasks.TASKS", {"small": task})
    bench = find_bench("small", protocol="plain", metric="exact", split="")
    one, two = bench.loaded.questions
    assert (one.id, one.text, one.answers, one.category) == ("a.png 0", "what is <mask>?", ("cat",), "noun")
    assert (one.extra["regions"], "regions" in two.extra) == (["second"], False)
    assert (bench.protocol.prompt(two), bench.protocol.max_new_tokens) == ("how many?", 3)
    with pytest.raises(ValueError, match="metric='vqa' was given for task small"):
        find_bench("small", metric="vqa")
    with pytest.raises(ValueError, match="data='here' was given for task small"):
        find_bench("small", data="here")


def test_an_unknown_task_names_the_one_that_was_meant():
    with pytest.raises(ValueError, match=r"task 'popee' is unknown; .*easy-vqa.*vqav2.*did you mean pope\?"):
        find_bench("popee")
    with pytest.raises(ValueError, match="task 'own' is unknown"):
        find_bench("own")


def test_a_benchmark_needs_its_files_and_has_one_metric():
    with pytest.raises(ValueError, match="task pope needs its files; give --data DIR"):
        find_bench("pope")
    with pytest.raises(ValueError, match="metric='exact' was given for task pope, which is scored by pope"):
        find_bench("pope", data="hub", metric="exact")


def test_a_benchmark_without_answers_is_scored_elsewhere(files):
    files(BenchQuestion(id="1", text="what?"))
    assert not find_bench("docvqa", data="here").is_scored
    files(BenchQuestion(id="1", text="what?", answers=("a cat",)))
    assert find_bench("docvqa", data="here").is_scored
    assert not find_bench("mm-vet", data="here").is_scored


def test_what_some_questions_lack_is_a_problem_and_what_all_lack_is_an_error(files):
    read = BenchQuestion(id="1", text="what?", answers=("a",) * 10, extra={"ocr": ["STOP"]})
    bare = BenchQuestion(id="2", text="what?", answers=("a",) * 10)
    files(read, bare)
    bench = find_bench("textvqa", data="here")
    assert [question.is_broken for question in bench.loaded.questions] == [False, True]
    assert "has no ocr" in bench.loaded.problems[0].text
    files(bare)
    with pytest.raises(ValueError, match=r"none of the 1 questions of textvqa can be asked, such as 2: .*no ocr"):
        find_bench("textvqa", data="here")


def test_the_box_of_refcoco_is_drawn_on_the_image(files):
    image = Image.new("RGB", (100, 50), "white")
    boxes = ((0.1, 0.2, 0.5, 0.8), (0, 0, 1, 1))
    asked = [
        BenchQuestion(id=str(box), text="what?", images=(image,), answers=("a",), extra={"box": box}) for box in boxes
    ]
    files(*asked)
    one, two = find_bench("refcoco", data="here").loaded.questions
    (picture,) = one.open_images()
    assert picture.getpixel((10, 10)) == picture.getpixel((50, 40)) == (255, 0, 0)
    assert picture.getpixel((30, 30)) == image.getpixel((10, 10)) == (255, 255, 255)
    assert one.image_key != two.image_key
