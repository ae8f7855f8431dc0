"""vLLM's greedy answers are those of transformers, token for token."""

from __future__ import annotations

import pytest

from tokenpacker.hf import carried_model_path
from vllm_cases import Case, Transformers, answers, start

FIVE_TILES, TWO_TILES, ONE_TILE = (200, 300), (96, 190), (96, 96)


def ask(question: str = "what number is in the red box?", images: int = 1) -> str:
    return f"<s>USER: {'<image> ' * images}{question} ASSISTANT:"


@pytest.fixture(scope="module")
def theirs():
    return Transformers(carried_model_path())


@pytest.fixture(scope="module")
def engine(theirs):
    return start(carried_model_path(), enable_lora=True, max_lora_rank=8, limit_mm_per_prompt={"image": 3})


@pytest.fixture
def equal(engine, theirs):
    """Asks both, and compares prompts and answers."""

    def compare(*cases: Case) -> list[list[int]]:
        ours = answers(engine, list(cases))
        assert ours == [theirs.answer(case) for case in cases]
        return [prompt for prompt, _ in ours]

    return compare


def test_a_question_about_an_image_of_one_tile(equal, image_of):
    equal(Case(ask(), [image_of(*ONE_TILE)]))


def test_a_batch_of_mixed_sizes_with_and_without_images(equal, image_of):
    equal(
        Case(ask(), [image_of(*FIVE_TILES)]),
        Case(ask("what is it?"), [image_of(*TWO_TILES, 1)]),
        Case(ask("hello", images=0)),
        Case(ask("what color is it?"), [image_of(500, 90, 2)]),
    )


def test_several_images_in_one_prompt(equal, image_of):
    equal(
        Case(ask("which is red?", images=3), [image_of(*FIVE_TILES), image_of(*ONE_TILE, 1), image_of(*TWO_TILES, 2)])
    )


def test_requests_of_one_batch_have_scale_factors_and_budgets_of_their_own(equal, image_of):
    image = image_of(*FIVE_TILES)
    options = [{}, {"scale_factor": 1}, {"scale_factor": 3}, {"scale_factor": 4, "max_image_tokens": 40}]
    lengths = [len(prompt) for prompt in equal(*(Case(ask(), [image], option) for option in options))]
    assert len(set(lengths)) == 4


def test_the_same_image_again_comes_from_the_caches_and_with_other_options_it_does_not(equal, image_of):
    image = image_of(*TWO_TILES, 7)
    first, again, other = (Case(ask(), [image], options) for options in ({}, {}, {"scale_factor": 3}))
    equal(first)
    equal(again, other)
    equal(Case(ask("what is it?", images=2), [image, image_of(*ONE_TILE, 8)]))  # one cached, one not
    equal(Case(ask(), [image_of(*TWO_TILES, 9)]))  # as long a prompt, another image


def test_an_image_is_turned_as_its_exif_orientation_says_and_not_mixed_up_with_the_same_pixels(equal, image_of):
    image = image_of(*TWO_TILES, 10)
    turned = image.copy()
    turned.getexif()[274] = 6  # orientation: a quarter turn
    equal(Case(ask(), [image]))
    equal(Case(ask(), [turned]))


def test_a_start_token_that_a_prompt_begins_with_is_not_added_again(equal, image_of, theirs):
    image = image_of(*ONE_TILE)
    (prompt, _) = equal(Case(ask(), [image]), Case(ask().removeprefix("<s>"), [image]))
    assert prompt.count(theirs.processor.tokenizer.bos_token_id) == 1


def test_a_chat_in_vllms_own_form_gives_the_processors_prompt(engine, theirs, image_of):
    from vllm import SamplingParams

    def chat(image_part: dict) -> list[dict]:
        return [
            {"role": "user", "content": [image_part, {"type": "text", "text": "what is it?"}]},
            {"role": "assistant", "content": "a circle"},
            {"role": "user", "content": [{"type": "text", "text": "what color?"}]},
        ]

    image = image_of(*FIVE_TILES)
    text = theirs.processor.apply_chat_template(chat({"type": "image"}), add_generation_prompt=True)
    messages = chat({"type": "image_pil", "image_pil": image})
    (output,) = engine.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert (list(output.prompt_token_ids), list(output.outputs[0].token_ids)) == theirs.answer(Case(text, [image]))


def test_a_prompt_may_be_token_ids(engine, theirs, image_of):
    from vllm import SamplingParams

    case = Case(ask(), [image_of(*TWO_TILES)])
    ids = theirs.processor.tokenizer(case.prompt, add_special_tokens=False).input_ids
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": case.images}}
    (output,) = engine.generate(prompt, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    assert (list(output.prompt_token_ids), list(output.outputs[0].token_ids)) == theirs.answer(case)


def test_an_adapter_of_the_language_model_is_applied(engine, theirs, image_of, tmp_path):
    import torch
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    case = Case(ask("what is it?"), [image_of(*ONE_TILE, 3)])
    plain = theirs.answer(case)
    torch.manual_seed(0)
    targets = r".*language_model.*\.(q_proj|v_proj|gate_proj|down_proj)"
    config = LoraConfig(r=8, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    adapted = get_peft_model(Transformers(carried_model_path()).model, config)
    adapted.save_pretrained(tmp_path)
    expected = theirs.answer(case, model=adapted)
    assert answers(engine, [case], lora_request=LoRARequest("adapter", 1, str(tmp_path))) == [expected]
    assert expected != plain == answers(engine, [case])[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale_facto": 3}, "no option 'scale_facto'; did you mean scale_factor"),
        ({"tile_size": [10, 10]}, "no option 'tile_size'"),
        ({"scale_factor": [2, 3]}, "must be one whole number"),
        ({"scale_factor": 100}, "exceeds patch_grid"),
        ({"max_image_tokens": 1}, "max_image_tokens=1"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(engine, image_of, options, message):
    with pytest.raises(ValueError, match=message):
        answers(engine, [Case(ask(), [image_of(*ONE_TILE)], options)])


@pytest.mark.parametrize("images", [0, 1])
def test_marks_and_images_must_agree(engine, image_of, images):
    with pytest.raises(ValueError, match="2 marks <image> for"):
        answers(engine, [Case(ask(images=2), [image_of(*ONE_TILE)] * images)])
