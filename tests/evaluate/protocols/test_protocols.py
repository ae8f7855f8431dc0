import doctest
import re

import pytest

import tokenpacker.evaluate.metrics
import tokenpacker.evaluate.protocols
from tokenpacker.evaluate.bench_question import BenchQuestion
from tokenpacker.evaluate.metrics import METRICS
from tokenpacker.evaluate.protocols import PROTOCOLS, Protocol, benchmarks, protocol, protocol_names
from tokenpacker.evaluate.published import HEADLINES, PUBLISHED, published

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
UNSURE = "When the provided information is insufficient, respond with 'Unanswerable'."
PLAIN = BenchQuestion(id="1", text="what brand is this CAMERA?", extra={"ocr": ["LUMIX", "5"]})
CHOICE = BenchQuestion(
    id="2", text="Which one?", answers=("B",), extra={"options": ["fox {a}", "bear"], "hint": "In the wood."}
)
NO_HINT = BenchQuestion(id="3", text="Which one?", answers=("B",), extra={"options": ["fox", "bear"]})
MME = BenchQuestion(id="4", text="Is there a cat? Please answer yes or no.")
BOX = BenchQuestion(id="5", text="the left cat", answers=("[0, 0, 1, 1]",))

EXACT = [
    ("vqav2", "paper", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("vqav2", "lmms-eval", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("gqa", "paper", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("gqa", "lmms-eval", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("vizwiz", "paper", PLAIN, f"what brand is this CAMERA?\n{UNSURE}\n{SHORT}"),
    ("vizwiz", "lmms-eval", PLAIN, f"What brand is this camera?\n{UNSURE}\n{SHORT}"),
    ("textvqa", "paper", PLAIN, f"What brand is this camera?\nReference OCR token: LUMIX, 5\n{SHORT}"),
    ("textvqa", "no-ocr", PLAIN, f"What brand is this camera?\n{SHORT}"),
    ("textvqa", "lmms-eval", PLAIN, f"What brand is this camera?\n{SHORT}"),
    ("docvqa", "paper", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("docvqa", "lmms-eval", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("chartqa", "paper", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("chartqa", "lmms-eval", PLAIN, "what brand is this CAMERA?\nAnswer the question with a single word."),
    ("ocrbench", "paper", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("ocrbench", "lmms-eval", PLAIN, "what brand is this CAMERA?"),
    ("pope", "paper", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("pope", "lmms-eval", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("mme", "paper", MME, f"Is there a cat?\n{SHORT}"),
    ("mme", "lmms-eval", MME, f"Is there a cat?\n{SHORT}"),
    ("mmbench", "paper", CHOICE, f"In the wood.\nWhich one?\nA. fox {{a}}\nB. bear\n{LETTER}"),
    ("mmbench", "paper", NO_HINT, f"Which one?\nA. fox\nB. bear\n{LETTER}"),
    (
        "mmbench",
        "lmms-eval",
        CHOICE,
        f"In the wood. Which one? There are several options:\nA. fox {{a}}\nB. bear\n\n{LETTER}",
    ),
    ("mmbench", "lmms-eval", NO_HINT, f"Which one? There are several options:\nA. fox\nB. bear\n\n{LETTER}"),
    ("seed", "paper", NO_HINT, f"Which one?\nA. fox\nB. bear\n{LETTER}"),
    ("seed", "lmms-eval", NO_HINT, f"Which one?\nA. fox\nB. bear\n{LETTER}"),
    ("scienceqa", "paper", CHOICE, f"Context: In the wood.\nWhich one?\nA. fox {{a}}\nB. bear\n{LETTER}"),
    ("scienceqa", "paper", NO_HINT, f"Which one?\nA. fox\nB. bear\n{LETTER}"),
    ("scienceqa", "lmms-eval", CHOICE, f"Context: In the wood.\nWhich one?\nA. fox {{a}}\nB. bear\n{LETTER}"),
    ("mmmu", "paper", NO_HINT, f"Which one?\n\n(A) fox\n(B) bear\n\n\n{LETTER}"),
    ("mmmu", "paper", PLAIN, f"what brand is this CAMERA?\n\n{SHORT}"),
    ("mmmu", "lmms-eval", NO_HINT, f"Which one?\nA. fox\nB. bear\n\n{LETTER}"),
    ("mmmu", "lmms-eval", PLAIN, f"what brand is this CAMERA?\n\n{SHORT}"),
    ("mm-vet", "paper", PLAIN, "what brand is this CAMERA?"),
    (
        "mm-vet",
        "lmms-eval",
        PLAIN,
        "First please perform reasoning, and think step by step to provide best answer to the following question: \n\n"
        "what brand is this CAMERA?",
    ),
    ("refcoco", "lmms-eval", BOX, "Provide a short description for this region."),
    (
        "refcoco-boxes",
        "lmms-eval",
        BOX,
        "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y)."
        " All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of"
        " the region this sentence describes: the left cat",
    ),
    ("own", "plain", PLAIN, "what brand is this CAMERA?"),
    ("own", "short", PLAIN, f"what brand is this CAMERA?\n{SHORT}"),
    ("own", "letter", NO_HINT, f"Which one?\nA. fox\nB. bear\n{LETTER}"),
]


@pytest.mark.parametrize(("benchmark", "name", "question", "prompt"), EXACT)
def test_the_prompt_is_exactly_this(benchmark, name, question, prompt):
    assert protocol(benchmark, name).prompt(question) == prompt


def test_every_protocol_has_a_prompt_above():
    assert {(benchmark, name) for benchmark, name, _, _ in EXACT} == set(PROTOCOLS)


@pytest.mark.parametrize("listed", PROTOCOLS.values(), ids=lambda listed: f"{listed.benchmark}-{listed.name}")
def test_a_protocol_is_greedy_has_a_metric_and_says_where_its_values_come_from(listed):
    assert (listed.temperature, listed.num_beams) == (0, 1)
    assert listed.metric in METRICS
    assert "all" in listed.sources or "prompt" in listed.sources
    if listed.name == "paper":
        assert {"prompt", "max_new_tokens"} <= set(listed.sources)


LIMITS = {
    "paper": {"mmbench": 1024, "scienceqa": 1024, "mmmu": 1024, "mm-vet": 1024},
    "lmms-eval": {
        "vqav2": 16, "gqa": 16, "chartqa": 16, "mme": 16, "scienceqa": 16, "docvqa": 32, "vizwiz": 1024,
        "textvqa": 1024, "mmbench": 1024, "seed": 1024, "mm-vet": 1024, "refcoco": 1024, "refcoco-boxes": 1024,
    },
}  # fmt: skip


def test_answers_are_as_long_as_the_sources_allow():
    found = {
        name: {listed.benchmark: listed.max_new_tokens for listed in PROTOCOLS.values() if listed.name == name}
        for name in LIMITS
    }
    for name, limits in found.items():
        assert limits == {benchmark: LIMITS[name].get(benchmark, 128) for benchmark in limits}


def test_the_default_is_the_papers_where_there_is_one():
    assert protocol("textvqa").name == "paper"
    assert protocol("refcoco").name == "lmms-eval"
    assert [name for name in benchmarks() if protocol(name).name != "paper"] == ["refcoco", "refcoco-boxes", "own"]


def test_the_papers_protocol_keeps_the_prompt_of_llavas_own_file():
    given = BenchQuestion(id="1", text="?", extra={"prompt": "WHAT?\nReference OCR token: A\nShort."})
    assert protocol("textvqa").prompt(given) == "WHAT?\nReference OCR token: A\nShort."
    assert protocol("textvqa", "no-ocr").prompt(given) == f"?\n{SHORT}"


def test_a_question_that_lacks_what_the_prompt_needs_is_refused():
    bare = BenchQuestion(id="7", text="what?")
    with pytest.raises(ValueError, match="'7' has no ocr, which protocol 'paper' of textvqa needs"):
        protocol("textvqa").prompt(bare)
    with pytest.raises(ValueError, match="'7' has no options, which protocol 'paper' of seed needs"):
        protocol("seed").prompt(bare)


def test_an_image_without_text_has_an_empty_ocr_line():
    nothing = BenchQuestion(id="1", text="what?", extra={"ocr": []})
    assert protocol("textvqa").prompt(nothing) == f"What?\nReference OCR token: \n{SHORT}"


def test_unknown_names_list_the_valid_ones():
    with pytest.raises(ValueError, match="benchmark 'texvqa' is unknown; use one of: vqav2, gqa"):
        protocol_names("texvqa")
    with pytest.raises(ValueError, match="protocol 'ocr' of textvqa is unknown; use one of: paper, no-ocr, lmms-eval"):
        protocol("textvqa", "ocr")


def test_a_template_has_known_fields_only():
    with pytest.raises(ValueError, match=re.escape("template has the fields ['qestion']; use some of: question")):
        Protocol(benchmark="own", name="x", metric="exact", template="{qestion}", max_new_tokens=1, sources={})


def test_the_example_of_the_package_is_right():
    assert doctest.testmod(tokenpacker.evaluate.protocols).attempted > 0
    assert doctest.testmod(tokenpacker.evaluate.protocols).failed == 0


def test_a_published_number_is_one_that_the_metric_gives():
    """The names, on a question of each benchmark; MM-Vet's is what its own evaluator calls it."""
    for benchmark, number in HEADLINES.items():
        metric = METRICS[protocol(benchmark).metric]
        row = tokenpacker.evaluate.metrics.Row(BenchQuestion(id="1", text="?", answers=("yes",)), "yes", 1.0)
        assert next(iter(metric.aggregate([row]))) == number
    assert {row.benchmark for row in PUBLISHED} == set(HEADLINES)


def test_published_means_are_those_of_the_paper():
    """DESIGN: the mean of six benchmarks, which the paper rounds."""
    means = {("mlp", 576): 62.0, ("token-packer", 144): 62.8, ("token-packer", 64): 61.9, ("resampler", 64): 60.1}
    for (model, tokens), mean in means.items():
        scores = [row.score for row in PUBLISHED if (row.model, row.tokens) == (model, tokens)]
        assert len(scores) == 6
        assert sum(scores) / 6 == pytest.approx(mean, abs=0.051)


def test_published_results_of_a_benchmark_start_with_most_tokens():
    tokens = [row.tokens for row in published("pope")]
    assert tokens == sorted(tokens, reverse=True)
    assert len(tokens) == 13 + 6  # released models
    assert published("seed") == ()
