"""Runs into a folder: every question once, the same answers however they are asked, and the same score at the end."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from tokenpacker import progress
from tokenpacker.evaluate import asker, bench_folder
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.asker import Asker
from tokenpacker.evaluate.bench_folder import RunFolder, RunSettings
from tokenpacker.evaluate.bench_question import BenchQuestion, StoredImage
from tokenpacker.evaluate.bench_run import RunningScore, run_benches, summary
from tokenpacker.evaluate.bench_tasks import Bench, find_bench
from tokenpacker.evaluate.layouts.loaded import Loaded
from tokenpacker.evaluate.metrics import Row, find_metric
from tokenpacker.evaluate.protocols import Protocol, protocol

OWN = (Plan(),)
PLANS = [Plan(), Plan(scale_factor=4), Plan(max_image_tokens=60)]
SETTINGS = {"model": "toy", "fingerprint": "abc"}
SHORT = Protocol(benchmark="own", name="plain", metric="exact", template="{question}", max_new_tokens=5, sources={})
ROWS = [
    {"image": ["one.png", "seven.png"], "question": "which?", "answer": "a"},
    {"image": "three.png", "question": "how many words are there?", "answer": "b"},
    {"image": "one.png", "question": "what?", "answer": "c", "category": "x"},
    {"image": "three.png", "question": "is it?", "answer": "d"},
    {"image": ["three.png", "three.png"], "question": "who?", "answer": "e"},
    {"image": "seven.png", "question": "where? " * 60, "answer": "f"},
]
# Ends itself as `kill -9` does, in the middle of the second batch, and leaves a row that is not whole.
KILLED = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
from tokenpacker.evaluate import asker
from tokenpacker.evaluate.answer_rows import Plan
from tokenpacker.evaluate.bench_run import run_benches
from tokenpacker.evaluate.bench_tasks import find_bench
from tokenpacker.evaluate.bench_folder import RunSettings
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.whole_files import WholeLines
source, model, out = sys.argv[1:]
append, calls = WholeLines.append, []
def dying(self, lines):
    calls.append(lines)
    if len(calls) == 2:
        append(self, lines[:len(lines) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    append(self, lines)
WholeLines.append = dying
load = lambda: [part.from_pretrained(model) for part in (TokenPackerForConditionalGeneration, TokenPackerProcessor)]
settings = RunSettings(model="toy", fingerprint="abc")
bench = find_bench(source)
bench = replace(bench, protocol=replace(bench.protocol, max_new_tokens=5))
run_benches([bench], [Plan()], Path(out), load, settings, batch_size=2, progress=False)
"""


WRITE_REPORT = RunFolder.write_report


@pytest.fixture(autouse=True)
def no_page(monkeypatch):
    """The page has tests of its own."""
    monkeypatch.setattr(RunFolder, "write_report", lambda folder: None)


@pytest.fixture
def run(talkative_model, tiny_processor, tmp_path):
    """Runs tasks: `run(bench, ..., plans=[...], limit=3)`; the outcome."""

    def call(*benches: Bench, out="out", plans=OWN, batch_size=64, overwrite=False, **settings):
        return run_benches(
            [short(bench) for bench in benches],
            plans,
            tmp_path / out,
            lambda: (talkative_model, tiny_processor),
            RunSettings(**{**SETTINGS, **settings}),
            batch_size=batch_size,
            overwrite=overwrite,
            progress=False,
        )

    return call


@pytest.fixture
def rows_of(tmp_path):
    """The rows of a task at a plan, by id; an id that occurs twice fails."""

    def read(task: str = "mine", plan: str = "own", out: str = "out") -> dict[str, dict]:
        lines = (tmp_path / out / "answers" / task / f"{plan}.jsonl").read_text().splitlines()
        rows = {row["id"]: row for row in map(json.loads, lines)}
        assert len(rows) == len(lines)
        return rows

    return read


@pytest.fixture
def stopped_after(monkeypatch):
    """Ctrl-C after so many batches."""

    def stop_after(batches: int) -> None:
        answer, left = Asker.answer, iter(range(batches))

        def stopping(self, groups, max_new_tokens):
            if next(left, None) is None:
                raise KeyboardInterrupt
            return answer(self, groups, max_new_tokens)

        monkeypatch.setattr(Asker, "answer", stopping)

    return stop_after


def short(bench: Bench) -> Bench:
    """The task with short answers; this model would never end one."""
    return replace(bench, protocol=replace(bench.protocol, max_new_tokens=5))


def bench_of(*questions: BenchQuestion, metric: str = "exact", scored: bool = True, asked: Protocol = SHORT) -> Bench:
    return Bench(
        name="made",
        protocol=asked,
        metric=find_metric(metric),
        loaded=Loaded(questions=questions),
        data=None,
        is_scored=scored,
    )


def plain_answer(model, processor, question: BenchQuestion, plan: Plan, max_new_tokens: int) -> tuple[str, int]:
    """The answer as any transformers user would get it, and the number of tokens of the prompt."""
    pictures = question.open_images()
    content = [*[{"type": "image"}] * len(pictures), {"type": "text", "text": question.text.strip()}]
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(images=pictures or None, text=prompt, return_tensors="pt", **vars(plan))
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
    length = inputs["input_ids"].shape[1]
    return processor.tokenizer.decode(output[0, length:], skip_special_tokens=True).strip(), length


@pytest.mark.parametrize("room", [asker.MAX_BATCH_TOKENS, 700], ids=["in one piece", "in pieces"])
def test_batched_answers_equal_single_and_plain_ones_over_images_and_budgets(
    run, rows_of, own_file, talkative_model, tiny_processor, monkeypatch, room
):
    monkeypatch.setattr(asker, "MAX_BATCH_TOKENS", room)
    bench = find_bench(str(own_file(*ROWS)))
    without = BenchQuestion(id="text", text="what is this?", answers=("x",))
    bench = bench_of(*bench.loaded.questions, without)
    run(bench, plans=PLANS)
    run(bench, plans=PLANS, out="single", batch_size=1)
    told = []
    for plan in PLANS:
        rows = rows_of("made", plan.name)
        assert rows == rows_of("made", plan.name, "single")
        for question in bench.loaded.questions:
            row = rows[question.id]
            plain, length = plain_answer(talkative_model, tiny_processor, question, plan, max_new_tokens=5)
            assert (row["answer"], row["prompt_tokens"]) == (plain, length)
            sizes = [(picture.height, picture.width) for picture in question.open_images()]
            layouts = [tiny_processor.image_layout(size, **vars(plan)) for size in sizes]
            assert row["image_tokens"] == sum(layout.num_tokens for layout in layouts)
            assert row["answer_tokens"] <= 5
            told.append(plain)
    assert len(set(told)) > len(told) / 3  # or this test would prove nothing


def test_images_are_opened_late_and_encoded_once(run, talkative_model, image_of, monkeypatch):
    encoded, opened = [], []
    features = type(talkative_model).get_image_features

    def counting(self, pixel_values, *args, **kwargs):
        encoded.append(len(pixel_values))
        return features(self, pixel_values, *args, **kwargs)

    monkeypatch.setattr(type(talkative_model), "get_image_features", counting)
    content = [png(image_of(32, 32, seed=seed)) for seed in range(3)]

    def read(number: int) -> bytes:
        opened.append((number, sum(encoded)))
        return content[number]

    stored = [StoredImage(str(number), lambda number=number: read(number)) for number in range(3)]
    asked = [BenchQuestion(id=f"{n} {t}", text=t, images=(stored[n],), answers=("x",)) for n in range(3) for t in "ab"]
    run(bench_of(*asked), batch_size=2)
    assert encoded == [1, 1, 1]
    assert [before for number, before in opened if number == 2] == [2, 2]  # for its size, and for its pixels


def png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on_and_answers_each_question_once(own_file, tiny_model_dir, tmp_path, rows_of, run):
    source = own_file(*ROWS, {**ROWS[0], "image": "gone.png"})
    arguments = [sys.executable, "-c", KILLED, str(source), str(tiny_model_dir), str(tmp_path / "out")]
    killed = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    path = tmp_path / "out" / "answers" / "mine" / "own.jsonl"
    whole, torn = path.read_bytes().rsplit(b"\n", 1)
    assert whole
    assert torn
    before = path.read_bytes()[: len(whole) + 1]
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor

    parts = [
        part.from_pretrained(tiny_model_dir) for part in (TokenPackerForConditionalGeneration, TokenPackerProcessor)
    ]
    notes: list[str] = []
    outcomes = [
        run_benches(
            [short(find_bench(str(source)))],
            [Plan()],
            tmp_path / out,
            lambda: parts,
            RunSettings(**SETTINGS),
            batch_size=2,
            progress=False,
            on_note=notes.append,
        )
        for out in ("out", "whole")
    ]
    answered = len(before.splitlines())
    assert notes == [f"mine own: {answered} questions have answers from before, {7 - answered} are left"]
    assert path.read_bytes().startswith(before)
    assert rows_of() == rows_of(out="whole")
    first, second = (outcome.results[0] | {"seconds": 0} for outcome in outcomes)
    assert first == second
    assert (first["questions"], first["answered"], first["problems"]) == (7, 6, 1)


def test_ctrl_c_leaves_the_score_of_a_part_and_the_next_call_goes_on(
    run, own_file, stopped_after, monkeypatch, rows_of
):
    bench = find_bench(str(own_file(*ROWS)))
    stopped_after(2)
    part = run(bench, batch_size=1)
    assert part.stopped
    assert 0 < part.results[0]["answered"] < len(ROWS)
    assert f"{part.results[0]['answered']} of {len(ROWS)} questions" in summary(part.results[0])
    monkeypatch.undo()
    monkeypatch.setattr(RunFolder, "write_report", lambda folder: None)
    rest = run(bench, batch_size=1)
    assert not rest.stopped
    assert rest.results[0]["answered"] == len(rows_of()) == len(ROWS)
    assert rest.results[0]["seconds"] > part.results[0]["seconds"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"limit": 3}, "was written with limit=None, not 3"),
        ({"fingerprint": "other"}, "was written with another model, toy"),
        ({"plans": PLANS}, "was written with the plans own"),
        ({"dtype": "float16"}, "was written with dtype=None, not float16"),
        ({"row": 0}, "was written with another data of mine"),
    ],
)
def test_a_folder_of_another_run_is_refused_and_overwrite_starts_anew(run, own_file, rows_of, change, text):
    run(find_bench(str(own_file(*ROWS))))
    rows = ROWS[1:] if "row" in change else ROWS
    bench, change = find_bench(str(own_file(*rows))), {name: change[name] for name in change if name != "row"}
    with pytest.raises(ValueError, match=f"{text}; add --overwrite to start anew, or choose another folder"):
        run(bench, **change)
    assert len(rows_of()) == len(ROWS)
    run(bench, overwrite=True, **change)
    assert len(rows_of()) == change.get("limit", len(rows))


def test_another_folder_a_damaged_one_and_a_second_writer_are_refused(run, own_file, tmp_path):
    bench = find_bench(str(own_file(*ROWS[:1])))
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "precious.txt").touch()
    with pytest.raises(ValueError, match=r"holds precious\.txt, and no results of evaluate; choose another folder"):
        run(bench, out="taken", overwrite=True)
    run(bench)
    with RunFolder(tmp_path / "out", {}).only_writer(), pytest.raises(ValueError, match="another process is writing"):
        run(bench)
    path = tmp_path / "out" / "answers" / "mine" / "own.jsonl"
    row = path.read_bytes()
    for damaged, text in ((row * 2, "line 2 answers no question that is open"), (b"{}\n", "line 1 is no answer")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{text}; add --overwrite"):
            run(bench)
    run(bench, overwrite=True)
    with pytest.raises(ValueError, match="two tasks are named mine"):
        run(bench, bench, out="twice")
    with pytest.raises(ValueError, match="two tasks are named mine"):
        run(bench, replace(bench, name="MINE"), out="twice")
    with pytest.raises(ValueError, match="two plans are named s2"):
        run(bench, plans=[Plan(scale_factor=2)] * 2, out="twice")


def test_a_run_that_was_killed_when_it_began_can_be_called_again(run, own_file, rows_of, tmp_path, monkeypatch):
    bench = find_bench(str(own_file(*ROWS[:1])))
    run(bench)
    with monkeypatch.context() as patch:
        patch.setattr(bench_folder.shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(bench, overwrite=True)
    run(bench, overwrite=True)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "run.part").write_text("{")
    run(bench, out="new")
    assert rows_of() == rows_of(out="new")


def test_a_question_that_is_too_long_for_the_model_is_a_problem_of_its_own(run, own_file, rows_of):
    long = {**ROWS[1], "question": "what is it? " * 3000}
    result = run(find_bench(str(own_file(ROWS[1], long, ROWS[3])))).results[0]
    rows = rows_of()
    assert (result["answered"], result["problems"]) == (2, 1)
    assert "tokens but the model reads fewer than " in rows["2"]["problem"]
    run(find_bench(str(own_file(ROWS[1], ROWS[3], name="short.jsonl"))), out="short")
    assert [rows[id]["answer"] for id in "13"] == [row["answer"] for row in rows_of("short", out="short").values()]


BROKEN = [
    "{",
    {**ROWS[0], "id": "a"},
    {**ROWS[0], "id": "a"},
    {**ROWS[0], "image": "gone.png"},
    {**ROWS[0], "image": "bad.png"},
]


@pytest.mark.parametrize(("skip", "counted"), [(False, 5), (True, 1)])
def test_what_cannot_be_asked_stays_in_the_denominator_unless_it_is_left_out(
    run, own_file, rows_of, tmp_path, monkeypatch, skip, counted
):
    (tmp_path / "bad.png").write_bytes(own_file(*BROKEN).parent.joinpath("one.png").read_bytes()[:80])  # cut off
    bench = find_bench(str(tmp_path / "mine.jsonl"))
    seen = []
    aggregate = type(bench.metric).aggregate
    monkeypatch.setattr(
        type(bench.metric),
        "aggregate",
        lambda self, rows, weights=None: seen.append(rows) or aggregate(self, rows, weights),
    )
    (result,) = run(bench, skip_broken=skip).results
    rows = rows_of()
    bad = rows["5"]
    assert (bad["answer"], bad["score"]) == (None, 0.0)
    assert "bad.png" in bad["problem"]
    found = {"kind": "could not be asked", "where": "5", "text": bad["problem"]}  # which the page lists, too
    assert result["not_asked"] == [found]
    assert result["problems"] == sum(row["problem"] is not None for row in rows.values()) == (1 if skip else 3)
    assert len(rows) == result["questions"] == (2 if skip else 5)
    assert len(max(seen, key=len)) == counted
    kinds = [
        problem["kind"] for problem in json.loads((tmp_path / "out" / "run.json").read_text())["tasks"][0]["problems"]
    ]
    assert kinds == ["malformed row", "duplicate id", "missing image"]


def test_what_a_server_scores_has_answers_and_a_submission_but_no_numbers(run, image_of, rows_of, tmp_path):
    asked = BenchQuestion(id="12", text="what?", images=(image_of(32, 32),))
    bench = bench_of(asked, metric="anls", scored=False, asked=protocol("docvqa"))
    (result,) = run(bench).results
    row = rows_of("made")["12"]
    assert (row["score"], result["numbers"], result["interval_95"]) == (None, {}, {})
    assert "scored by a server" in summary(result)
    submission = json.loads((tmp_path / "out" / "submissions" / "made-own.json").read_text())
    assert submission == [{"questionId": 12, "answer": row["answer"].rstrip(".")}]


def test_a_score_that_depends_on_all_answers_is_computed_at_the_end(run, image_of, rows_of):
    pytest.importorskip("pycocoevalcap")
    texts = ["a cat on a mat", "a dog", "two birds in a tree"]
    asked = [
        BenchQuestion(id=text, text=text, images=(image_of(32, 32, seed=len(text)),), answers=(text,)) for text in texts
    ]
    (result,) = run(bench_of(*asked, metric="refcoco")).results
    assert {row["score"] for row in rows_of("made").values()} == {None}
    assert "cider" in result["numbers"]


def test_regions_are_asked_about_in_one_piece_and_refused_by_a_model_without(region_model, image_of, run, tmp_path):
    boxes = [(0, 0, 12, 12), (4, 8, 30, 28)]
    image = image_of(32, 40)
    asked = [
        BenchQuestion(
            id=str(n), text=text, images=(image,), answers=("x",), extra={"regions": [boxes[i] for i in marked]}
        )
        for n, (text, marked) in enumerate([("what is <mask>?", [1]), ("<mask> or <mask>?", [0, 1]), ("<mask>?", [0])])
    ]
    with pytest.raises(ValueError, match="task 'made' asks about masks"):
        run(bench_of(*asked))
    model, processor = region_model
    run_benches(
        [bench_of(*asked)], [Plan()], tmp_path / "r", lambda: region_model, RunSettings(**SETTINGS), progress=False
    )
    rows = [json.loads(line) for line in (tmp_path / "r" / "answers" / "made" / "own.jsonl").read_text().splitlines()]
    for question, row in zip(asked, rows, strict=True):
        content = [{"type": "image"}, {"type": "text", "text": question.text}]
        prompt = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = processor(image, prompt, [question.extra["regions"]], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        assert row["answer"] == processor.tokenizer.decode(output, skip_special_tokens=True).strip()


def test_the_score_so_far_stands_in_the_progress(
    own_file, talkative_model, tiny_processor, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "FIRST_LINE_SECONDS", 0)
    parts = talkative_model, tiny_processor
    bench = find_bench(str(own_file(*ROWS)))
    run_benches([short(bench)], [Plan()], tmp_path / "out", lambda: parts, RunSettings(**SETTINGS), batch_size=1)
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("mine own: 1 of 6 (")
    assert first.endswith("; accuracy 0.0")


def test_the_last_score_in_the_progress_is_that_of_all_rows(own_file):
    bench = find_bench(str(own_file(*ROWS)))
    question = bench.loaded.questions[0]
    score = RunningScore(bench, [Row(question, "no", 0.0)])
    assert score.note() == "accuracy 0.0"
    score.add([Row(question, "yes", 1.0)])
    assert score.note() == "accuracy 0.0"  # computed less than a second ago
    assert score.note(last=True) == "accuracy 50.0"


def test_all_files_of_a_run_are_there(run, own_file, tmp_path, monkeypatch):
    monkeypatch.setattr(RunFolder, "write_report", WRITE_REPORT)
    results = run(find_bench(str(own_file(*ROWS))), plans=PLANS, limit=4).results
    assert [(result["task"], result["plan"]) for result in results] == [
        ("mine", "own"),
        ("mine", "s4"),
        ("mine", "max60"),
    ]
    said = json.loads((tmp_path / "out" / "results.json").read_text())
    assert said["results"] == results
    assert said["run"] == json.loads((tmp_path / "out" / "run.json").read_text())
    assert (said["run"]["format"], said["run"]["limit"], said["run"]["tasks"][0]["questions"]) == (1, 4, 4)
    assert [plan["name"] for plan in said["run"]["plans"]] == ["own", "s4", "max60"]
    assert "accuracy" in (tmp_path / "out" / "report.html").read_text()
    assert not list((tmp_path / "out").glob("*.partial"))
