"""Each benchmark in its layout: files -> questions -> prompt -> score, worked out by hand."""

import base64
from io import BytesIO
from random import Random

import pytest
from PIL import Image

from tokenpacker.evaluate.layouts import load_benchmark
from tokenpacker.evaluate.layouts.llava import LAYOUTS
from tokenpacker.evaluate.metrics import find_metric
from tokenpacker.evaluate.protocols import benchmarks, protocol

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
UNANSWERABLE = "\nWhen the provided information is insufficient, respond with 'Unanswerable'."


def row(id, image, text, category="default"):
    return {"question_id": id, "image": image, "text": text, "category": category}


def people(*answers):
    return [{"answer": answer, "answer_id": number} for number, answer in enumerate(answers, 1)]


def picture():
    """In base64, longer than what the csv module takes by itself."""
    data = BytesIO()
    Image.frombytes("RGB", (200, 200), Random(0).randbytes(3 * 200 * 200)).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def tsv(*rows):
    return "".join("\t".join(map(str, cells)) + "\n" for cells in rows)


POPE = {
    "pope/llava_pope_test.jsonl": [
        row(0, "a.jpg", f"Is there a dog in the image?{SHORT}", "popular"),
        row(1, "a.jpg", f"Is there a cat in the image?{SHORT}", "popular"),
        row(2, "a.jpg", f"Is there a dog in the image?{SHORT}", "adversarial"),
        row(3, "a.jpg", f"Is there a cup in the image?{SHORT}", "adversarial"),
    ],
    "pope/coco/coco_pope_popular.json": [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a cat in the image?", "label": "no"},
    ],
    "pope/coco/coco_pope_adversarial.json": [
        {"question_id": 1, "image": "a.jpg", "text": "Is there a dog in the image?", "label": "yes"},
        {"question_id": 2, "image": "a.jpg", "text": "Is there a cup in the image?", "label": "no"},
    ],
    "pope/val2014/a.jpg": None,
}
GQA = {
    "gqa/llava_gqa_testdev_balanced.jsonl": [
        row("201", "n1.jpg", f"What is it?{SHORT}"),
        row("202", "n1.jpg", f"Is it big?{SHORT}"),
    ],
    "gqa/data/testdev_balanced_questions.json": {"201": {"answer": "cat"}, "202": {"answer": "no"}},
    "gqa/data/images/n1.jpg": None,
}
VQA = {
    "vqav2/v2_OpenEnded_mscoco_val2014_questions.json": {
        "questions": [
            {"image_id": 42, "question": "What colour?", "question_id": 42000},
            {"image_id": 42, "question": "How many?", "question_id": 42001},
        ]
    },
    "vqav2/v2_mscoco_val2014_annotations.json": {
        "annotations": [
            {"question_id": 42001, "answer_type": "number", "answers": people(*["2"] * 10)},
            {"question_id": 42000, "answer_type": "other", "answers": people(*["red"] * 3, *["blue"] * 7)},
        ]
    },
    "vqav2/val2014/COCO_val2014_000000000042.jpg": None,
}
TEXTVQA = {
    "textvqa/llava_textvqa_val_v051_ocr.jsonl": [
        row("f00", "f00.jpg", f"What does it say?\nReference OCR token: STOP, ALL{SHORT}"),
        row("f00", "f00.jpg", f"What colour is it?\nReference OCR token: STOP, ALL{SHORT}"),
    ],
    "textvqa/TextVQA_0.5.1_val.json": {
        "data": [
            {"question_id": 7, "image_id": "f00", "question": "What colour is it?", "answers": ["red"] * 10},
            {"question_id": 8, "image_id": "f00", "question": "what does it say?", "answers": ["stop"] * 10},
        ]
    },
    "textvqa/train_images/f00.jpg": None,
}
MME = {
    "MME/llava_mme.jsonl": [
        row("existence/1.jpg", "existence/1.jpg", f"Is there a dog?{SHORT}", "existence"),
        row("existence/1.jpg", "existence/1.jpg", f"Is there a cat?{SHORT}", "existence"),
        row("scene/2.jpg", "scene/2.jpg", f"Is it a park?{SHORT}", "scene"),
        row("scene/2.jpg", "scene/2.jpg", f"Is it a shop?{SHORT}", "scene"),
    ],
    "MME/MME_Benchmark_release_version/existence/1.jpg": None,
    "MME/MME_Benchmark_release_version/existence/1.txt": (
        "Is there a dog?  Please answer yes or no.\tYes\nIs there a cat? Please answer yes or no.\tNo\n"
    ),
    "MME/MME_Benchmark_release_version/scene/images/2.jpg": None,
    "MME/MME_Benchmark_release_version/scene/questions_answers_YN/2.txt": (
        "Is it a park? Please answer yes or no.\tYes\nIs it a shop? Please answer yes or no.\tNo\n"
    ),
}
MMBENCH = {
    "mmbench/mmbench_dev_20230712.tsv": tsv(
        ["index", "question", "hint", *"ABCD", "answer", "category", "image", "source", "l2-category", "x", "split"],
        [5, "Which?", '"A hint\nof two lines"', "cat", "dog", "", "", "A", "kind", picture(), "", "", "", "dev"],
        [1000005, "Which?", "nan", "dog", "cat", "", "", "B", "kind", 5, "", "", "", "dev"],
        [6, "Where?", "", "in", "out", "by", "", "C", "place", picture(), "", "", "", "dev"],
    )
}
SEED = {
    "seed_bench/llava-seed-bench.jsonl": [
        row(101, "SEED-Bench-image/9_1", f"How many?\nA. 1\nB. 2\nC. 3\nD. 4{LETTER}", "Counting"),
        row(102, "SEED-Bench-video-image/b.png", f"What now?\nA. a\nB. b\nC. c\nD. d{LETTER}", "Action"),
    ],
    "seed_bench/SEED-Bench.json": {
        "questions": [
            {"question_id": "101", "question": "How many?", "choice_a": "1", "choice_b": "2", "choice_c": "3",
             "choice_d": "4", "answer": "B", "question_type_id": 5, "data_type": "image"},
            {"question_id": "102", "question": "What now?", "choice_a": "a", "choice_b": "b", "choice_c": "c",
             "choice_d": "d", "answer": "D", "question_type_id": 10, "data_type": "video"},
        ],
        "question_type": {"Instances Counting": 5, "Action Recognition": 10},
    },
    "seed_bench/SEED-Bench-image/9_1": None,
    "seed_bench/SEED-Bench-video-image/b.png": None,
}  # fmt: skip
SCIENCEQA = {
    "scienceqa/llava_test_CQM-A.json": [
        {"id": "4", "image": "4/image.png", "conversations": [
            {"from": "human", "value": f"<image>\nContext: N/A\nWhich?\nA. x\nB. y{LETTER}"},
            {"from": "gpt", "value": "The answer is B."}]},
        {"id": "5", "conversations": [{"from": "human", "value": f"Context: Hot.\nWhy?\nA. x\nB. y{LETTER}"}]},
    ],
    "scienceqa/problems.json": {
        "4": {"question": "Which?", "choices": ["x", "y"], "answer": 1, "hint": "", "subject": "natural science"},
        "5": {"question": "Why?", "choices": ["x", "y"], "answer": 0, "hint": "Hot.", "subject": "social science"},
    },
    "scienceqa/images/test/4/image.png": None,
}  # fmt: skip
REFCOCO = {
    "refcoco/refs.json": [
        {"ref_id": 1, "ann_id": 11, "image_id": 7, "split": "val", "sentences": [{"sent": "red cup"}, {"sent": "cup"}]},
        {"ref_id": 2, "ann_id": 11, "image_id": 7, "split": "testA", "sentences": [{"sent": "other split"}]},
    ],
    "refcoco/instances.json": {
        "images": [{"id": 7, "file_name": "COCO_train2014_000000000007.jpg", "height": 4, "width": 8}],
        "annotations": [{"id": 11, "image_id": 7, "category_id": 1, "bbox": [2, 1, 4, 2]}],
        "categories": [],
    },
    "refcoco/train2014/000000000007.jpg": None,
}
CASES = {
    "pope": (
        POPE, None, f"Is there a dog in the image?{SHORT}",
        {"0": "Yes", "1": "No", "2": "Yes", "3": "Yes"}, {"f1": (100 + 200 / 3) / 2},
    ),
    "gqa": (GQA, None, f"What is it?{SHORT}", {"201": "Cat.", "202": "yes"}, {"accuracy": 50}),
    "vqav2": (
        # The three who said red agree with 2 others each, the seven with all three: 0.3 * 2/3 + 0.7 * 1 = 0.9.
        VQA, "val", f"What colour?{SHORT}", {"42000": "Red", "42001": "three"},
        {"accuracy": 45, "accuracy/other": 90, "accuracy/number": 0},
    ),
    "vizwiz": (
        {"vizwiz/val.json": [{"image": "VizWiz_val_1.jpg", "question": "What is it?", "answers": people(*["can"] * 10),
                              "answer_type": "other"}], "vizwiz/val/VizWiz_val_1.jpg": None},
        "val", f"What is it?{UNANSWERABLE}{SHORT}", {"VizWiz_val_1.jpg": "can"}, {"accuracy": 100},
    ),
    "textvqa": (
        TEXTVQA, None, f"What does it say?\nReference OCR token: STOP, ALL{SHORT}",
        {"f00-8": "stop", "f00-7": "blue"}, {"accuracy": 50},
    ),
    "docvqa": (
        {"docvqa/val_v1.0_withQT.json": {"data": [
            {"questionId": 1, "question": "Who?", "image": "documents/a.png", "answers": ["Ann", "ann"]},
            {"questionId": 2, "question": "When?", "image": "documents/a.png", "answers": ["1990"]}]},
         "docvqa/documents/a.png": None},
        "val", f"Who?{SHORT}", {"1": "Ann", "2": "x"}, {"anls": 50},
    ),
    "chartqa": (
        {"chartqa/test/test_human.json": [{"imgname": "1.png", "query": "How much?", "label": "100"}],
         "chartqa/test/test_augmented.json": [{"imgname": "1.png", "query": "Who?", "label": "Ann"}],
         "chartqa/test/png/1.png": None},
        None, f"How much?{SHORT}", {"human-1": "104", "augmented-1": "Bob"},
        {"accuracy": 50, "accuracy/human": 100},
    ),
    "ocrbench": (
        {"ocr_bench/OCRBench.json": [
            {"dataset_name": "IIIT5K", "image_path": "w/1.png", "question": "what is written?", "answers": ["Chevron"],
             "type": "Regular Text Recognition"},
            {"dataset_name": "HME100k", "image_path": "w/1.png", "question": "which formula?", "answers": "x + y",
             "type": "Handwritten Mathematical Expression Recognition"}],
         "ocr_bench/OCRBench_Images/w/1.png": None},
        None, f"what is written?{SHORT}", {"1": "it is CHEVRON", "2": "x-y"},
        {"score": 500, "score/Text Recognition": 300},
    ),
    "mme": (
        # existence: both right, 100 + 100; scene: one of two, 50 + 0.
        MME, None, f"Is there a dog?{SHORT}",
        {"existence/1.jpg#1": "Yes", "existence/1.jpg#2": "No", "scene/2.jpg#1": "Yes", "scene/2.jpg#2": "Yes"},
        {"perception": 250, "points/existence": 200, "points/scene": 50},
    ),
    "mmbench": (
        MMBENCH, None, f"A hint\nof two lines\nWhich?\nA. cat\nB. dog{LETTER}",
        {"5": "A", "1000005": "A", "6": "C. by"}, {"accuracy": 50, "accuracy without rotations": 200 / 3},
    ),
    "seed": (
        SEED, None, f"How many?\nA. 1\nB. 2\nC. 3\nD. 4{LETTER}", {"101": "B", "102": "A"},
        {"accuracy": 50, "accuracy/Instances Counting": 100},
    ),
    "scienceqa": (
        SCIENCEQA, None, f"Context: N/A\nWhich?\nA. x\nB. y{LETTER}", {"4": "B", "5": "B"},
        {"accuracy IMG": 100, "accuracy": 50},
    ),
    "refcoco-boxes": (
        # The box is [0.25, 0.25, 0.75, 0.75]; the second answer's IoU is 0.25 / 1.
        REFCOCO, None, None, {"1-1": "[0.25, 0.25, 0.75, 0.7]", "1-2": "[0, 0, 1, 1]"}, {"accuracy@0.5": 50},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_benchmark_is_found_asked_and_scored(name, put):
    files, split, prompt, answers, numbers = CASES[name]
    loaded = load_benchmark(name, put(files), split=split)
    assert loaded.problems == ()
    assert {question.id for question in loaded.questions} == set(answers)
    paper = protocol(name)
    if prompt:
        assert paper.prompt(loaded.questions[0]) == prompt
    for question in loaded.questions:
        question.open_images()
    metric = find_metric(paper.metric)
    found = metric.aggregate(metric.rows(loaded.questions, answers))
    assert {key: found[key] for key in numbers} == pytest.approx(numbers)


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("vqav2", {"vqav2/llava_vqav2_mscoco_test-dev2015.jsonl": [row(1, "a.jpg", f"Why?{SHORT}")],
                   "vqav2/test2015/a.jpg": None}),
        ("vizwiz", {"vizwiz/llava_test.jsonl": [row("1", "a.jpg", f"Why?{UNANSWERABLE}{SHORT}")],
                    "vizwiz/test/a.jpg": None}),
        ("docvqa", {"docvqa/data/test_v1.0.json": {"data": [{"questionId": 1, "question": "Why?", "image": "d/a.jpg"}]},
                    "docvqa/images/a.jpg": None}),
        ("mm-vet", {"mm-vet/llava-mm-vet.jsonl": [row(1, "a.jpg", "Why?")], "mm-vet/images/a.jpg": None}),
        ("mmbench", {"mmbench/mmbench_test_20230712.tsv": tsv(
            ["index", "question", "A", "B", "image"], [1, "Why?", "x", "y", picture()])}),
    ],
)  # fmt: skip
def test_a_split_that_a_server_scores_has_questions_without_answers(name, files, put):
    loaded = load_benchmark(name, put(files))
    assert [(question.id, question.text, question.answers) for question in loaded.questions] == [("1", "Why?", ())]
    assert loaded.problems == ()
    assert "Why?" in protocol(name).prompt(loaded.questions[0])


def test_every_benchmark_but_mmmu_has_a_layout_of_its_own():
    assert set(benchmarks()) - {"own"} - set(LAYOUTS) == {"mmmu"}


def test_words_read_in_the_image_can_be_left_out(put):
    question = load_benchmark("textvqa", put(TEXTVQA)).questions[0]
    assert question.extra["ocr"] == ["STOP", "ALL"]
    assert protocol("textvqa", "no-ocr").prompt(question) == f"What does it say?{SHORT}"


def test_a_region_to_describe_has_its_box_in_shares(put):
    (question,) = load_benchmark("refcoco", put(REFCOCO)).questions
    assert question.extra["box"] == (0.25, 0.25, 0.75, 0.75)
    assert question.answers == ("red cup", "cup")
    assert protocol("refcoco").prompt(question) == "Provide a short description for this region."


def test_rotations_that_name_an_image_share_it(put):
    questions = load_benchmark("mmbench", put(MMBENCH)).questions
    assert questions[0].images[0] is questions[1].images[0]
    assert questions[0].images[0] is questions[2].images[0]  # the same content, kept once
    assert questions[1].options == ("dog", "cat")
    assert "hint" not in questions[1].extra  # pandas writes nan into an empty cell


def test_the_data_folder_may_be_the_benchmarks_own(put):
    assert len(load_benchmark("pope", put(POPE) / "pope").questions) == 4


def test_the_first_split_is_the_published_one(put):
    names = [f"vqav2/llava_vqav2_mscoco_{split}2015.jsonl" for split in ("test", "test-dev")]
    data = put(VQA | {name: [row(1, "a.jpg", "Why?")] for name in names} | {"vqav2/test2015/a.jpg": None})
    assert [load_benchmark("vqav2", data, split=split).split for split in (None, "test", "val")] == [
        "test-dev",
        "test",
        "val",
    ]
