"""Tiny Parquet files in the columns of lmms-eval's data sets, from the file through the prompt to a known score."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
from PIL import Image as Picture

from fake_hub import REVISION, FakeHub, endpoint
from tokenpacker.evaluate.bench_question import StoredImage
from tokenpacker.evaluate.layouts import hub_tables
from tokenpacker.evaluate.layouts.hub_tables import load_hub, load_table
from tokenpacker.evaluate.layouts.table_columns import TABLES
from tokenpacker.evaluate.metrics import find_metric
from tokenpacker.evaluate.protocols import protocol, protocol_names

datasets = pytest.importorskip("datasets")


def picture(color: str) -> dict[str, object]:
    """An image of 8 x 6 pixels as the datasets library keeps it."""
    file = io.BytesIO()
    Picture.new("RGB", (8, 6), color).save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


RED, BLUE = picture("red"), picture("blue")
PERSONS = 10


def write(folder, place: str, rows: list[dict], images: tuple[str, ...] = ("image",)):
    """Writes a Parquet file as the hub has it."""
    dataset = datasets.Dataset.from_list(rows)
    for name in images:
        feature = datasets.Image()
        if isinstance(rows[0][name], list):
            feature = datasets.Sequence(datasets.Image())
        dataset = dataset.cast_column(name, feature)
    path = folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.to_parquet(str(path))
    return path


def pope(number: int, category: str, answer: str, image=RED, source="COCO_val2014_1"):
    return {
        "id": str(number),
        "question_id": str(number),
        "question": "Is there a cat in the image?",
        "answer": answer,
        "image_source": source,
        "image": image,
        "category": category,
    }


def vqa(answers: list[str], **more):
    return {"question": "what is it?", "image": RED, "answers": answers, **more}


def mmbench(index: int, answer: str, hint: str | None = "nan", **options):
    return {
        "index": index, "question": "Which?", "hint": hint, "answer": answer, "A": "x", "B": "y", "C": "nan",
        "D": "nan", "category": "ocr", "image": RED, "source": "s", "L2-category": "l", "comment": "nan",
        "split": "dev", **options,
    }  # fmt: skip


def mmmu(id: str, question: str, options: str, answer: str, kind: str, *images):
    columns = {f"image_{number}": None for number in range(1, 8)}
    columns |= {f"image_{number}": image for number, image in enumerate(images, 1)}
    return {"id": id, "question": question, "options": options, "answer": answer, "question_type": kind, **columns}


def seed(id: str, kind: str, answer: str, images):
    choices = {f"choice_{letter}": f"text {letter}" for letter in "abcd"}
    more = {"data_id": "d", "data_type": kind, "question_id": id, "question_type_id": 1 if kind == "image" else 12}
    return {"question": "Which?", "answer": answer, "image": images, **choices, **more}


def scienceqa(answer: int, image, hint: str = ""):
    return {"image": image, "question": "Which?", "choices": ["x", "y"], "answer": answer, "hint": hint, "subject": "s"}


def region(id: str, captions: list[str]):
    return {
        "question_id": id, "image": RED, "question": "Please describe the region", "answer": captions,
        "segmentation": [1.0], "bbox": [2.0, 3.0, 4.0, 3.0], "iscrowd": 0, "file_name": "a.jpg",
    }  # fmt: skip


MMMU_IMAGES = tuple(f"image_{number}" for number in range(1, 8))
REGIONS = [region("1", ["the tall man in a red hat"]), region("2", ["one small dog on green grass", "a small dog"])]
DEFAULT = "data/{split}-00000-of-00001.parquet"
# benchmark -> (place -> rows), the answers in order, named numbers of the score
CASES = {
    "pope": (
        {
            DEFAULT: [
                pope(1, "random", "yes"),
                pope(2, "random", "no"),
                pope(1, "popular", "yes", BLUE, "COCO_val2014_2"),
                pope(2, "popular", "no", BLUE, "COCO_val2014_2"),
            ]
        },
        ["Yes", "Yes", "Yes", "No"],
        {"f1/random": 200 / 3, "f1/popular": 100.0, "f1": 250 / 3},
    ),
    "gqa": (
        {
            "testdev_balanced_instructions/testdev-00000-of-00001.parquet": [
                {"id": "20", "imageId": "n1", "question": "Is it red?", "answer": "yes", "fullAnswer": "Yes, it is."},
                {"id": "21", "imageId": "n1", "question": "What is it?", "answer": "a box", "fullAnswer": "A box."},
            ],
            "testdev_balanced_images/testdev-00000-of-00001.parquet": [
                {"id": "n2", "image": BLUE},
                {"id": "n1", "image": RED},
            ],
        },
        ["Yes.", "a ball"],
        {"accuracy": 50.0},
    ),
    "vqav2": (
        {
            DEFAULT: [
                vqa(
                    [{"answer": text, "answer_confidence": "yes", "answer_id": 1} for text in texts],
                    question_id=number,
                    image_id=9,
                    answer_type="other",
                    question_type="what",
                    multiple_choice_answer=texts[0],
                )
                for number, texts in enumerate((["red"] * PERSONS, ["cat"] * 3 + ["dog"] * 7))
            ]
        },
        ["Red", "cat"],
        {"accuracy": 95.0, "accuracy/other": 95.0},  # 3 of 10: (3 * 2/3 + 7) / 10
    ),
    "vizwiz": (
        {DEFAULT: [vqa(["unanswerable"] * PERSONS, question_id="VizWiz_val_0", category="unanswerable")]},
        ["Unanswerable"],
        {"accuracy": 100.0},
    ),
    "textvqa": (
        {DEFAULT: [vqa(["stop"] * PERSONS, question_id=34602, image_id="0a", ocr_tokens=["STOP", "ALL"])]},
        ["STOP."],
        {"accuracy": 100.0},
    ),
    "docvqa": (
        {
            f"DocVQA/{DEFAULT.partition('/')[2]}": [
                vqa(["2000", "year 2000"], questionId="5", ucsf_document_id="pybv0228", ucsf_document_page_no="81"),
                vqa(["annex"], questionId="6", ucsf_document_id="pybv0228", ucsf_document_page_no="81"),
            ]
        },
        ["2000", "nothing"],
        {"anls": 50.0},
    ),
    "chartqa": (
        {
            DEFAULT: [
                {"type": "human_test", "question": "How much?", "answer": "100", "image": RED},
                {"type": "augmented_test", "question": "Which?", "answer": "France", "image": RED},
            ]
        },
        ["104", "Spain"],
        {"accuracy": 50.0, "accuracy/human": 100.0, "accuracy/augmented": 0.0},
    ),
    "ocrbench": (
        {
            DEFAULT: [
                {
                    "dataset": "IIIT5K",
                    "question": "what is written in the image?",
                    "question_type": "Regular Text Recognition",
                    "answer": ["CENTRE"],
                    "image": RED,
                },
                {
                    "dataset": "HME100k",
                    "question": "Please write out the expression.",
                    "question_type": "Handwritten Mathematical Expression Recognition",
                    "answer": ["x + 1"],
                    "image": BLUE,
                },
            ]
        },
        ["The centre", "x+2"],
        {"score": 500.0, "score/Text Recognition": 300.0},
    ),
    "mme": (
        {
            DEFAULT: [
                {
                    "question_id": "existence/0006.png",
                    "image": RED,
                    "question": f"Is there a {what}? Please answer yes or no.",
                    "answer": answer,
                    "category": "existence",
                }
                for what, answer in (("cat", "Yes"), ("dog", "No"))
            ]
        },
        ["Yes", "No"],
        {"perception": 200.0, "cognition": 0.0},
    ),
    "mmbench": (
        {
            f"en/{DEFAULT.partition('/')[2]}": [
                mmbench(7, "A"),
                mmbench(1_000_007, "B"),
                mmbench(8, "A", "Read it."),
                mmbench(1_000_008, "C", "Read it.", C="z"),
            ]
        },
        ["A", "B", "A", "A"],
        {"accuracy": 50.0, "accuracy without rotations": 75.0, "rotations": 2.0},
    ),
    "mmmu": (
        {
            DEFAULT: [
                mmmu(
                    "validation_Accounting_1",
                    "<image 1> How much?",
                    "['$6', '<image 2>']",
                    "B",
                    "multiple-choice",
                    RED,
                    BLUE,
                ),
                mmmu(
                    "validation_Art_Theory_12", "Who? <image 1>", "[]", "['Monet', 'Claude Monet']", "open", RED, BLUE
                ),
            ]
        },
        ["B", "It is Claude Monet."],
        {"accuracy": 100.0, "accuracy/Accounting": 100.0, "accuracy/Art_Theory": 100.0},
    ),
    "mm-vet": (
        {DEFAULT: [{"question_id": "v1_0", "image": RED, "question": "What is x?", "answer": "-1<AND>-5"}]},
        ["-1"],
        None,
    ),
    "seed": (
        {DEFAULT: [seed("101", "image", "A", [RED]), seed("v2", "video", "B", [RED, BLUE])]},
        ["A", "C"],
        {"accuracy": 50.0, "accuracy/Scene Understanding": 100.0, "accuracy/Procedure Understanding": 0.0},
    ),
    "scienceqa": (
        {f"ScienceQA-FULL/{DEFAULT.partition('/')[2]}": [scienceqa(0, RED, "Look."), scienceqa(1, None)]},
        ["A", "A"],
        {"accuracy IMG": 100.0, "accuracy": 50.0},
    ),
    "refcoco": ({DEFAULT: REGIONS}, ["the tall man in a red hat", "one small dog on green grass"], None),
    "refcoco-boxes": (
        {DEFAULT: REGIONS},
        ["[0.25, 0.5, 0.75, 1.0]", "[0, 0, 0.2, 0.2]", "no box"],
        {"accuracy@0.5": 100 / 3, "mean IoU": 100 / 3},
    ),
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The datasets library keeps its files in a folder of the tests."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def write_case(benchmark: str, folder):
    """Writes a benchmark's files below `folder` as a copy of the repository, and returns this copy."""
    table = TABLES[benchmark]
    split = table.find_split(None)
    copy = folder / table.repository.partition("/")[2]
    for place, rows in CASES[benchmark][0].items():
        images = [name for name in table.images if name in rows[0]]
        write(copy, place.format(split=split), rows, images)
    return copy


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Makes a hub that serves the files below a folder as a benchmark's repository: `with hub("pope", folder)`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))

    @contextmanager
    def served(benchmark, copy):
        files = {path.relative_to(copy).as_posix(): path.read_bytes() for path in copy.rglob("*.parquet")}
        hub = FakeHub(TABLES[benchmark].repository, files, tuple(files))
        with hub.serve(), endpoint(monkeypatch, hub.address):
            yield hub

    return served


def described(questions):
    """All of questions but the images' files."""
    return [(one.id, one.text, one.answers, dict(one.extra), one.image_key, len(one.images)) for one in questions]


def test_every_data_set_has_a_case():
    assert list(CASES) == list(TABLES)


@pytest.mark.parametrize("benchmark", CASES)
def test_a_data_set_gives_the_known_score_from_a_folder_and_from_the_hub(hub, tmp_path, benchmark):
    copy = write_case(benchmark, tmp_path)
    _, given, expected = CASES[benchmark]
    loaded = load_table(benchmark, tmp_path)
    with hub(benchmark, copy):
        from_hub = load_hub(benchmark)
    assert described(loaded.questions) == described(from_hub.questions)
    assert loaded.problems == from_hub.problems == ()
    assert (loaded.source, loaded.split) == (str(copy), TABLES[benchmark].find_split(None))
    assert from_hub.source == f"{TABLES[benchmark].repository}@{REVISION}"
    for question in loaded.questions:
        assert all(isinstance(image, StoredImage) for image in question.images)
        assert {image.size for image in question.open_images()} <= {(8, 6)}
        for name in protocol_names(benchmark):
            assert "nan\n" not in protocol(benchmark, name).prompt(question)
    if expected is not None:
        metric = find_metric(protocol(benchmark).metric)
        answers = {question.id: answer for question, answer in zip(loaded.questions, given, strict=True)}
        numbers = metric.aggregate(metric.rows(loaded.questions, answers))
        assert {name: numbers[name] for name in expected} == pytest.approx(expected)


def test_descriptions_of_regions_are_scored_by_cider(tmp_path):
    pytest.importorskip("pycocoevalcap")
    write_case("refcoco", tmp_path)
    questions = load_table("refcoco", tmp_path).questions
    rows = find_metric("refcoco").rows(questions, dict(zip("12", CASES["refcoco"][1], strict=True)))
    assert rows[0].score == pytest.approx(10)  # the words of the only reference
    assert questions[0].extra["box"] == (0.25, 0.5, 0.75, 1.0)


def test_the_parts_of_a_question_are_where_prompts_and_metrics_look(tmp_path):
    for benchmark in ("textvqa", "mmbench", "mmmu", "scienceqa", "mme", "seed"):
        write_case(benchmark, tmp_path)
    (text,) = load_table("textvqa", tmp_path).questions
    assert text.extra["ocr"] == ["STOP", "ALL"]
    plain, _, hinted, _ = load_table("mmbench", tmp_path).questions
    assert plain.options == ("x", "y")
    assert "hint" not in plain.extra
    assert hinted.extra["hint"] == "Read it."
    choice, open_question = load_table("mmmu", tmp_path).questions
    assert len(choice.images) == 2  # an option shows the second
    assert len(open_question.images) == 1  # nothing names the second
    assert open_question.answers == ("Monet", "Claude Monet")
    with_image, without = load_table("scienceqa", tmp_path).questions
    assert protocol("scienceqa").prompt(with_image).startswith("Context: Look.\nWhich?\nA. x\nB. y\n")
    assert without.images == ()
    assert without.answers == ("B",)
    assert [question.extra["group"] for question in load_table("mme", tmp_path).questions] == ["existence/0006.png"] * 2
    assert [len(question.images) for question in load_table("seed", tmp_path).questions] == [1, 2]


def test_questions_about_the_same_image_share_its_key(tmp_path):
    for benchmark in ("pope", "gqa", "mmbench", "chartqa", "refcoco-boxes"):
        write_case(benchmark, tmp_path)
    keys = {
        name: [one.image_key for one in load_table(name, tmp_path).questions] for name in ("pope", "gqa", "mmbench")
    }
    first, second, third, fourth = keys["pope"]
    assert first == second == "lmms-lab-encoder/POPE/COCO_val2014_1"
    assert third == fourth == "lmms-lab-encoder/POPE/COCO_val2014_2"
    assert len(set(keys["gqa"])) == 1
    assert keys["mmbench"][0] == keys["mmbench"][1] != keys["mmbench"][2]
    for name in ("chartqa", "refcoco-boxes"):  # without an image id: by the bytes
        assert len({one.image_key for one in load_table(name, tmp_path).questions}) == 1


def test_the_answers_of_a_split_may_be_hidden(tmp_path):
    rows = [vqa(None, question_id=number, image_id="0a", ocr_tokens=["A"]) for number in range(2)]
    write(tmp_path, "textvqa/data/test-00000-of-00001.parquet", rows)
    loaded = load_table("textvqa", tmp_path, "test")
    assert [question.answers for question in loaded.questions] == [(), ()]
    assert loaded.problems == ()
    rows = [mmmu("test_Math_1", "<image 1>", "['1', '2']", "?", "multiple-choice", RED)]
    write(tmp_path, "MMMU/data/test-00000-of-00001.parquet", rows, MMMU_IMAGES[:1])
    (question,) = load_table("mmmu", tmp_path, "test").questions
    assert question.answers == ()


def test_val_and_validation_mean_the_same(tmp_path):
    write_case("textvqa", tmp_path)
    assert load_table("textvqa", tmp_path, "val").split == "validation"


def test_another_split_may_be_another_configuration(tmp_path):
    write(tmp_path, "POPE/Full/random-00000-of-00001.parquet", [pope(1, "random", "yes")])
    assert load_table("pope", tmp_path, "random").split == "random"
    with pytest.raises(ValueError, match=r"pope has no split 'train'; use one of: test, adversarial, popular, random"):
        load_table("pope", tmp_path, "train")
    with pytest.raises(
        ValueError, match=r"POPE has no data/test-\*\.parquet; `tokenpacker data get pope --split test "
    ):
        load_table("pope", tmp_path)


@pytest.mark.parametrize("place", ["POPE", "pope", "Pope", "lmms-lab-encoder/POPE"])
def test_a_copy_is_found_under_the_names_of_repository_and_benchmark(tmp_path, place):
    write(tmp_path, f"{place}/data/test-00000-of-00001.parquet", [pope(1, "random", "yes")])
    assert len(load_table("pope", tmp_path).questions) == 1
    assert len(load_table("pope", tmp_path / place).questions) == 1  # the copy itself
    assert load_table("gqa", tmp_path) is None
    assert load_table("own", tmp_path) is None


def test_bad_rows_are_listed_and_stay_in_the_denominator(tmp_path):
    rows = [
        mmbench(1, "A"),
        mmbench(2, "A", question=None),
        mmbench(3, "D"),
        mmbench(4, "A", image=None),
        mmbench(5, "nan"),
        mmbench(1, "B"),
    ]
    write(tmp_path, "MMBench/en/dev-00000-of-00001.parquet", rows)
    loaded = load_table("mmbench", tmp_path)
    assert [(problem.kind, problem.where) for problem in loaded.problems] == [
        ("malformed row", "mmbench dev, row 2"),
        ("malformed row", "mmbench dev, row 3"),
        ("missing image", "4"),
        ("malformed row", "5"),
        ("duplicate id", "1"),
    ]
    assert loaded.problems[0].text == "id=2 and question=None must not be empty"
    assert loaded.problems[1].text == "answer='D' is no letter of the 2 options"
    assert loaded.problems[2].text == "the row has no image"
    assert loaded.problems[3].text.startswith("question '5' has no reference answers")
    assert [question.id for question in loaded.questions if "problem" not in question.extra] == ["1", "1 (2)"]
    assert len(loaded.questions) == 6


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (mmmu("validation_Math_1", "<image 2>", "['1', '2']", "A", "multiple-choice", RED), "image_2 has no image"),
        (mmmu("validation_Math_1", "<image 1>", "1, 2 or", "A", "multiple-choice", RED), "'1, 2 or' is no list"),
    ],
)
def test_a_broken_question_of_mmmu_says_what_is_wrong(tmp_path, row, text):
    write(tmp_path, "MMMU/data/validation-00000-of-00001.parquet", [row], MMMU_IMAGES[:1])
    (problem,) = load_table("mmmu", tmp_path).problems
    assert text in problem.text


def test_an_image_that_another_configuration_lacks_is_missing(tmp_path):
    copy = write_case("gqa", tmp_path)
    write(copy, "testdev_balanced_images/testdev-00000-of-00001.parquet", [{"id": "n2", "image": BLUE}])
    loaded = load_table("gqa", tmp_path)
    assert [(one.kind, one.where, one.text) for one in loaded.problems] == [
        ("missing image", id, "the image n1 is missing") for id in ("20", "21")
    ]


def test_a_region_with_an_empty_text_is_malformed_and_the_others_are_not(tmp_path):
    rows = [region("1", ["a man", "", "a hat"]), region("2", [])]
    write(tmp_path, "RefCOCO/data/val-00000-of-00001.parquet", rows)
    loaded = load_table("refcoco-boxes", tmp_path)
    broken = ["refcoco-boxes val, row 1, text 2", "refcoco-boxes val, row 2, text 1"]
    assert [problem.where for problem in loaded.problems] == broken
    assert [question.id for question in loaded.questions] == ["1/1", broken[0], "1/3", broken[1]]


def test_frames_of_which_one_is_missing_are_a_missing_image(tmp_path):
    write(tmp_path, "SEED-Bench/data/test-00000-of-00001.parquet", [seed("v2", "video", "B", [RED, None])])
    (problem,) = load_table("seed", tmp_path).problems
    assert (problem.kind, problem.text) == ("missing image", "the column image has no image")


def test_a_damaged_image_is_an_error_of_its_question_alone(tmp_path):
    rows = [pope(1, "random", "yes", {"bytes": b"no image", "path": None}, "a"), pope(2, "random", "yes")]
    write(tmp_path, "POPE/data/test-00000-of-00001.parquet", rows)
    bad, good = load_table("pope", tmp_path).questions
    with pytest.raises(ValueError, match="image"):
        bad.open_images()
    assert len(good.open_images()) == 1


def test_other_columns_are_one_error(tmp_path):
    row = {"question_id": "1", "question": "?", "label": "yes", "picture": RED}
    write(tmp_path, "POPE/data/test-00000-of-00001.parquet", [row], ("picture",))
    with pytest.raises(ValueError, match=r"POPE has no column answer but question_id, question, label, picture; pope "):
        load_table("pope", tmp_path)


def test_files_that_are_not_whole_are_refused(tmp_path):
    first = write(tmp_path, "POPE/data/test-00000-of-00002.parquet", [pope(1, "random", "yes")])
    with pytest.raises(ValueError, match=r"has 1 of 2 files data/test-\*\.parquet; `tokenpacker data get pope"):
        load_table("pope", tmp_path)
    second = first.with_name("test-00001-of-00002.parquet")
    second.write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match=r"test-00001-of-00002\.parquet is no whole Parquet file"):
        load_table("pope", tmp_path)
    second.write_bytes(b"PAR1" + bytes(100) + b"PAR1")
    with pytest.raises(ValueError, match=r"cannot be read \("):
        load_table("pope", tmp_path)


def test_images_are_read_by_many_threads(tmp_path):
    colors = [f"#{number:02x}0000" for number in range(64)]
    rows = [pope(number, "random", "yes", picture(color), str(number)) for number, color in enumerate(colors)]
    write(tmp_path, "POPE/data/test-00000-of-00001.parquet", rows)
    questions = load_table("pope", tmp_path).questions
    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(lambda question: question.open_images()[0].getpixel((0, 0))[0], questions))
    assert seen == list(range(64))


def test_a_split_of_the_hub_is_fetched_alone_and_once(hub, tmp_path, monkeypatch):
    copy = write_case("pope", tmp_path)
    write(copy, "Full/random-00000-of-00001.parquet", [pope(1, "random", "yes")])
    with hub("pope", copy) as served:
        first = load_hub("pope")
        again = load_hub("pope")
        assert served.requests == {"data/test-00000-of-00001.parquet": 1}
    monkeypatch.setattr(hub_tables, "hub_problem", lambda: "no network")
    offline = load_hub("pope")
    assert described(first.questions) == described(again.questions) == described(offline.questions)
    assert offline.source == f"lmms-lab-encoder/POPE@{REVISION}"
    with pytest.raises(ValueError, match=r"no network|has no Full/random"):  # older huggingface_hub: the second
        load_hub("pope", "random")


def test_a_hub_that_cannot_be_reached_is_one_error_that_says_what_to_do(hub, monkeypatch):
    monkeypatch.setattr(hub_tables, "hub_problem", lambda: "no network")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with pytest.raises(
        ValueError, match=r"POPE cannot be fetched \(no network\); fetch it with `tokenpacker data get pope "
    ):
        load_hub("pope")
    with pytest.raises(ValueError, match=r"benchmark 'own' has no data set on the hub; use one of: pope, gqa, "):
        load_hub("own")
