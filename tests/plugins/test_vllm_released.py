"""A converted checkpoint in the original's layout answers under vLLM as under transformers."""

from __future__ import annotations

import pytest

from tokenpacker.checkpoints import convert
from vllm_cases import Case, Transformers, answers, start


@pytest.fixture(scope="module")
def folder(make_golden, tmp_path_factory):
    target = tmp_path_factory.mktemp("converted") / "model"
    # vLLM's attention on the CPU takes no heads narrower than 32
    convert(make_golden("--hidden-size", "128") / "llava-tokenpacker", target)
    return target


@pytest.fixture(scope="module")
def theirs(folder):
    return Transformers(folder)


@pytest.fixture(scope="module")
def engine(folder):
    return start(folder)


def test_images_of_one_and_of_several_tiles(engine, theirs, image_of):
    cases = [
        Case("<s>USER: <image>\nwhat is it? ASSISTANT:", [image_of(300, 300)]),
        Case("A chat. USER: <image>\nwhat is it? ASSISTANT:", [image_of(336, 600, 1)], {"scale_factor": 4}),
    ]
    assert answers(engine, cases, max_tokens=6) == [theirs.answer(case, max_tokens=6) for case in cases]


@pytest.mark.parametrize(
    "text",
    ["hello", "<s>hello", "USER: a ASSISTANT: b</s>USER: c ASSISTANT:", "a</s>word </s> word<s>word", " two  spaces\n"],
)
def test_text_has_the_ids_that_the_checkpoint_was_trained_with(engine, theirs, text):
    ((prompt, _),) = answers(engine, [Case(text)], max_tokens=1)
    assert prompt == theirs.processor(text=text)["input_ids"][0]
