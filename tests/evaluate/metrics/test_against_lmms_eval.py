"""The same answers through lmms-eval's own functions. Where the two differ by intent, the test says so."""

import importlib
import random
import shutil
from copy import deepcopy

import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS

pytestmark = pytest.mark.slow  # lmms-eval takes many seconds to import


def lmms(module: str):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed; docs/evaluation.md says how")
    return importlib.import_module(f"lmms_eval.{module}")


def ask(number: int, *references: str, **extra) -> BenchQuestion:
    return BenchQuestion(id=str(number), text="?", answers=references, extra=extra)


WORDS = [
    "yes", "no", "Two", "2", "the cat", "cat", "a red bus", "red bus.", "dont know", "don't know", "t-shirt", "1,000",
    "1000", "3.5", "red/blue", "Nike's", "nike", "left\nright", "none", "0", "ten", "yall", "(red)", "st. john", "50%",
    "red, blue", "really?", "someonell go", "", "é", "12:30", "wont", "an an", "o'clock", "5'10\"", "black & white",
]  # fmt: skip


def draws(count: int = 150):
    draw = random.Random(0)
    for number in range(count):
        few = draw.sample(WORDS, 3)
        yield number, [draw.choice(few) for _ in range(10)], draw.choice([*few, draw.choice(WORDS)])


@pytest.mark.parametrize("name", ["vqa", "textvqa", "vizwiz"])
def test_vqa_accuracy(name):
    module, function = {
        "vqa": ("tasks.vqav2.utils", "vqav2_process_results"),
        "textvqa": ("tasks.textvqa.utils", "textvqa_process_results"),
        "vizwiz": ("tasks.vizwiz_vqa.utils", "vizwiz_vqa_process_results"),
    }[name]
    theirs = getattr(lmms(module), function)
    for number, references, answer in draws():
        if not answer:  # a blank answer is wrong here, also where people left theirs blank
            continue
        rows = [{"answer": text, "answer_id": place} for place, text in enumerate(references)]
        doc = {"question_id": number, "answers": rows if name == "vqa" else list(references)}
        score = METRICS[name].score(answer, ask(number, *references))
        assert score == pytest.approx(theirs(deepcopy(doc), [answer])["exact_match"]), (references, answer)


def test_anls():
    pytest.importorskip("anls", reason="anls is not installed; it is in the extra evaluate")
    theirs = lmms("api.metrics").anls
    for answer, references in [
        ("stop", ["STOP"]), ("stap", ["stop", "go"]), ("stxx", ["stopped"]), ("7 March 1998", ["March 7, 1998"]),
        ("something else", ["x"]), ("12.5", ["12,5", "12.5 %"]), ("été", ["ete", "étê"]),
    ]:  # fmt: skip
        assert METRICS["anls"].score(answer, ask(0, *references)) == pytest.approx(theirs(references, [answer])["anls"])
    # At a distance of exactly half, the official rule gives 0: NL < 0.5 is asked for. lmms-eval gives 0.5.
    assert (METRICS["anls"].score("stxx", ask(0, "stop")), theirs(["stop"], ["stxx"])["anls"]) == (0, 0.5)


def test_relaxed_accuracy():
    theirs = lmms("tasks.chartqa.utils").relaxed_correctness
    texts = ["100", "105", "105.1", "95", "-100", "5%", "0.05", "0", "0.0", "France", "france", "nan", "1e2", "5 %"]
    for answer in texts:
        for reference in texts:
            assert METRICS["relaxed"].score(answer, ask(0, reference)) == theirs(answer, reference)


def test_pope():
    theirs = lmms("tasks.pope.utils")
    draw = random.Random(1)
    questions = [ask(number, draw.choice(["yes", "no"]), category="random") for number in range(100)]
    said = {question.id: draw.choice(["Yes", "no", "yes", "No"]) for question in questions}
    rows = [
        theirs.pope_process_results({"answer": question.answers[0], "question_id": question.id}, [said[question.id]])
        for question in questions
    ]
    results = [row["pope_f1_score"] for row in rows]
    numbers = METRICS["pope"].aggregate(METRICS["pope"].rows(questions, said))
    for name in ("accuracy", "precision", "recall"):
        assert numbers[name] == pytest.approx(100 * getattr(theirs, f"pope_aggregate_{name}")(results))
    assert (
        numbers["f1"] == numbers["f1 of all together"] == pytest.approx(100 * theirs.pope_aggregate_f1_score(results))
    )
    # lmms-eval's yes ratio is of the references, not of the answers.


def test_mme():
    theirs = lmms("tasks.mme.utils")
    draw = random.Random(2)
    questions = [
        ask(2 * pair + place, answer, category=category, group=f"{pair}.png")
        for pair, category in enumerate(["count", "OCR", "scene", "code_reasoning", "text_translation"] * 8)
        for place, answer in enumerate(["Yes", "No"])
    ]
    said = {question.id: draw.choice(["Yes", "no.", "y", "Nothing", "It is", "yes, it"]) for question in questions}
    results: dict[str, list] = {"mme_perception_score": [], "mme_cognition_score": []}
    for question in questions:
        doc = {"answer": question.answers[0], "category": question.category, "question_id": question.extra["group"]}
        for name, row in theirs.mme_process_results(doc, [said[question.id]]).items():
            results[name].append(row)
    numbers = METRICS["mme"].aggregate(METRICS["mme"].rows(questions, said))
    for half in ("perception", "cognition"):
        assert numbers[half] == pytest.approx(theirs.mme_aggregate_results(results[f"mme_{half}_score"]))


def test_mmbench():
    theirs = lmms("tasks.mmbench.en_utils").mmbench_evaluator
    draw = random.Random(3)
    questions = [
        ask(rotation * 1_000_000 + number, draw.choice("ABC"), category=f"c{number % 3}")
        for number in range(30)
        for rotation in range(3)
    ]
    said = {question.id: draw.choice([question.answers[0]] * 5 + ["A.", "B", "(C)", "none"]) for question in questions}
    results = [
        {
            "index": int(question.id), "question": "?", "answer": question.answers[0], "prediction": said[question.id],
            "category": question.category, "A": "fox", "B": "bear", "C": "wolf", "D": float("nan"),
        }
        for question in questions
    ]  # fmt: skip
    overall, by_category, _ = theirs.eval_result(results, eval_method="static")
    numbers = METRICS["mmbench"].aggregate(METRICS["mmbench"].rows(questions, said))
    assert numbers["accuracy"] == pytest.approx(100 * overall)
    assert {f"accuracy/{name}": 100 * share for name, share in by_category.items()} == pytest.approx(
        {name: value for name, value in numbers.items() if name.startswith("accuracy/")}
    )


def test_ocrbench():
    theirs = lmms("tasks.ocrbench.utils").ocrbench_process_results
    formulas = "Handwritten Mathematical Expression Recognition"
    for kind, source in [("Doc-oriented VQA", "docVQA"), (formulas, "HME100k")]:
        for answer in ["x ^ 2", "It is X^2.", "＄５ each", "two\nlines", "x^2\n"]:
            for reference in ["x^2", "$5", "two lines", "X^2"]:
                doc = {"answer": ["?!", reference], "dataset": source, "question_type": kind}
                score = METRICS["ocrbench"].score(answer, ask(0, "?!", reference, category=kind))
                assert score == theirs(doc, [answer])["ocrbench_accuracy"]["score"], (kind, answer, reference)


def test_gqa():
    theirs = lmms("api.metrics").exact_match_hf_evaluate
    for answer, reference in [("Red.", "red"), ("red", "red"), ("the red", "red"), ("Yes", "no"), ("left", "left")]:
        wanted = theirs([answer], [reference], ignore_case=True, ignore_punctuation=True)["exact_match"]
        assert METRICS["gqa"].score(answer, ask(0, reference)) == wanted
    # lmms-eval leaves out every punctuation mark, LLaVA's conversion a final period.
    assert METRICS["gqa"].score("t-shirt", ask(0, "tshirt")) == 0


def test_seed():
    theirs = lmms("tasks.seedbench.utils")
    answers = ["A", "b", "C.", "D", "(B)", "B. cat", "A"]
    questions = [ask(place, "B" if place % 2 else "A") for place in range(len(answers))]
    rows = METRICS["seed"].rows(questions, {str(place): answer for place, answer in enumerate(answers)})
    results = [
        theirs.seed_process_result({"answer": question.answers[0], "data_type": "image", "question_id": 0}, [answer])
        for question, answer in zip(questions, answers, strict=True)
        if answer != "(B)"  # lmms-eval takes the first character, here the bracket
    ]
    plain = [row for row in rows if row.answer != "(B)"]
    wanted = theirs.seed_aggregation_result([result["seed_all"] for result in results])
    assert METRICS["seed"].aggregate(plain)["accuracy"] == pytest.approx(100 * wanted)


def test_scienceqa():
    theirs = lmms("tasks.scienceqa.utils").sqa_process_results
    doc = {"choices": ["fox", "bear", "wolf"], "answer": 1}
    for answer in ["B", "B. bear", "A", "C. wolf", "bear", "", "D"]:
        assert METRICS["scienceqa"].score(answer, ask(0, "B")) == theirs(doc, [answer])["exact_match"]
    # LLaVA also reads `The answer is B`, and takes no small letter.
    assert (METRICS["scienceqa"].score("The answer is B.", ask(0, "B")), theirs(doc, ["The answer is B."])) == (
        1, {"exact_match": 0.0},
    )  # fmt: skip


OPTIONS = ["red fox", "brown bear", "grey wolf"]
CHOICES = ["B", "(B)", "B.", "(A) or (C)", "I choose B here", "It must be the animal grey wolf, surely", "A B", "b"]
OPEN = [
    ("12", "12"), ("The answer is 12.0", "12"), ("x = 1,200", "1200"), ("about 1,234 m", "234"), ("1.2e3", "1200"),
    ("so it is a triangle", "Triangle"), ("a square", "Triangle"), ("xyz", "x"), ("it is x here", "x"), ("-3", "-3"),
    ("first.\nThus 7", "7"), ("result is : ", "7"), ("1.204", "1.2"), ("50%", "50"), ("The final answer is: 5 km", "5"),
]  # fmt: skip


def test_mmmu():
    theirs = lmms("tasks.mmmu.utils")

    def wanted(kind: str, reference: str, answer: str) -> float:
        doc = {"question_type": kind, "options": str(OPTIONS), "answer": reference, "id": "validation_Art_1"}
        return theirs.evaluate_mmmu([theirs.mmmu_process_results(doc, [answer])["mmmu_acc"]])[1]["acc"]

    for answer in CHOICES[:-1]:
        for letter in "ABC":
            score = METRICS["mmmu"].score(answer, ask(0, letter, options=OPTIONS))
            assert score == wanted("multiple-choice", letter, answer), (answer, letter)
    # lmms-eval draws an option at random for `b`; here it is wrong.
    assert METRICS["mmmu"].score(CHOICES[-1], ask(0, "B", options=OPTIONS)) == 0
    for answer, reference in OPEN:
        assert METRICS["mmmu"].score(answer, ask(0, reference)) == wanted("open", reference, answer), (
            answer,
            reference,
        )


def test_boxes():
    theirs = lmms("tasks.refcoco.utils_rec")
    draw = random.Random(4)
    for _ in range(50):
        first, second = ([round(draw.random(), 2) for _ in range(2)] for _ in range(2))
        box = [*first, first[0] + 0.3, first[1] + 0.2]
        other = [*second, second[0] + 0.4, second[1] + 0.1]
        wanted = theirs.compute_iou(other, theirs.parse_float_sequence_within(str(box)))
        assert METRICS["iou"].score(str(box), ask(0, str(other))) == pytest.approx(wanted)


@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed, which lmms-eval splits words with")
def test_cider():
    theirs = lmms("tasks.refcoco.utils")
    texts = ["The man's t-shirt, on the left", "left man", "a dog that isn't sitting", "guy in red!", "red guy"]
    questions = [ask(place, text, texts[place - 1]) for place, text in enumerate(texts)]
    said = {str(place): texts[(place * 2) % 5] for place in range(5)}
    numbers = METRICS["refcoco"].aggregate(METRICS["refcoco"].rows(questions, said))
    results = [
        {"answer": list(question.answers), "pred": said[question.id], "ann_id": question.id} for question in questions
    ]
    assert numbers["cider"] == pytest.approx(100 * theirs.refcoco_cider(results))
