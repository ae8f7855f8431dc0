import shutil

import pytest

from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.metrics.region_text import caption_words


def box(reference: str) -> BenchQuestion:
    return BenchQuestion(id=reference, text="the left cat", answers=(reference,))


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("[0, 0, 2, 2]", 1),
        ("The box is [1, 0, 3, 2].", 2 / 6),  # 1 x 2 shared, 4 + 4 - 2 in all
        ("(0.0, 0.0, 2.0, 1.0)", 0.5),
        ("[2, 2, 4, 4]", 0),
        ("[2, 2, 0, 0]", 0),  # no area
        ("0, 0, 2, 2", 0),
        ("left", 0),
    ],
)
def test_iou_is_the_shared_area_of_all_area(answer, wanted):
    assert METRICS["iou"].score(answer, box("[0, 0, 2, 2]")) == pytest.approx(wanted)


def test_a_box_is_right_from_an_iou_of_one_half():
    questions = [box("[0, 0, 2, 2]"), box("[0, 0, 4, 4]")]
    rows = METRICS["iou"].rows(questions, {"[0, 0, 2, 2]": "[0, 0, 2, 1]", "[0, 0, 4, 4]": "[0, 0, 2, 2]"})
    assert METRICS["iou"].aggregate(rows) == {"accuracy@0.5": 50, "mean IoU": 37.5}


def test_a_reference_that_is_no_box_is_refused():
    with pytest.raises(ValueError, match=r"'left' has the reference 'left', which is no box"):
        METRICS["iou"].score("[0, 0, 1, 1]", box("left"))


def caption(number: int, *references: str) -> BenchQuestion:
    return BenchQuestion(id=str(number), text="?", answers=references)


def test_cider_of_the_only_reference_is_ten_for_four_words_and_less_for_two():
    """Each length of n-grams that both have gives cosine 1, each that neither has gives 0; the mean times 10."""
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed; it is in the extra evaluate")
    questions = [caption(0, "the small red cat"), caption(1, "left bus"), caption(2, "tree")]
    rows = METRICS["refcoco"].rows(questions, {"0": "The small, red cat!", "1": "left bus"})
    assert [row.score for row in rows] == pytest.approx([10, 5, 0])
    assert METRICS["refcoco"].aggregate(rows) == pytest.approx({"cider": 500})


def test_cider_gives_shared_words_their_share():
    """Reference `red cat`, answer `red dog`; `red` is in 1 of 2 references as is `cat`, `dog` in none.

    All weigh log 2 (a word in no reference counts as in one). Cosine of words 1/2, of pairs 0; 10 * (1/2 + 0) / 4.
    """
    pytest.importorskip("pycocoevalcap", reason="pycocoevalcap is not installed; it is in the extra evaluate")
    rows = METRICS["refcoco"].rows([caption(0, "red cat"), caption(1, "blue bus")], {"0": "red dog"})
    assert rows[0].score == pytest.approx(10 * 0.5 / 4)


def test_cider_has_no_score_for_a_single_question():
    with pytest.raises(ValueError, match=r"use Metric\.rows with all of them"):
        METRICS["refcoco"].score("a cat", caption(0, "a cat"))


SENTENCES = [
    "The man's t-shirt, on the left.",
    "don't know",
    "guy w/ black/white hat!",
    "woman (in red)",
    "2nd from left; 3rd row",
    "the dog that isn't sitting",
    "person: 'far right'",
    'the "tall" one & her friend',
    "#2 man's 50% off sign",
    "bike [left], bus",
    "couldn't see - maybe the guy?",
    "they're both red; it's blue",
]


def test_words_are_split_as_penn_treebank_does():
    assert [caption_words(text) for text in SENTENCES[:2]] == ["the man 's t-shirt on the left", "do n't know"]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("java") is None, reason="Java is not installed, which pycocoevalcap's tokenizer is")
def test_words_are_split_as_pycocoevalcap_splits_them():
    tokenizer = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer", reason="pycocoevalcap is not installed")
    split = tokenizer.PTBTokenizer().tokenize({place: [{"caption": text}] for place, text in enumerate(SENTENCES)})
    assert [caption_words(text) for text in SENTENCES] == [split[place][0] for place in range(len(SENTENCES))]
