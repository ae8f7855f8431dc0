import json

import pytest

from tokenpacker.hf.processing.chat import CHAT_FORMATS, LLAVA_SYSTEM, VICUNA_SYSTEM, chat_template


def render(tokenizer, messages, *, generate=False, **options):
    template = chat_template(**options)
    return tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=generate
    ).removeprefix("<s>")


def image_question(text):
    return [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]


def conversation(messages):
    """The messages of a LLaVA conversation, without a first one that is not from the human."""
    roles = {"human": "user", "gpt": "assistant"}
    chat = [{"role": roles[message["from"]], "content": message["value"]} for message in messages]
    return chat if chat[0]["role"] == "user" else chat[1:]


def test_every_format_writes_the_originals_prompt(tiny_tokenizer, golden):
    expected = json.loads((golden / "text/text.json").read_text())["inference_prompts"]
    assert expected.keys() == CHAT_FORMATS.keys()
    for name, case in expected.items():
        prompt = render(tiny_tokenizer, image_question("What is this?"), generate=True, format=name)
        assert prompt == case["prompt"], name


def test_conversations_are_written_as_the_original_did(tiny_tokenizer, golden):
    cases = json.loads((golden / "text/text.json").read_text())["conversations"]
    cases = [case for case in cases if case["template"] == "v1"]
    assert cases
    for case in cases:
        messages = conversation(case["after_preprocess_multimodal"])
        assert render(tiny_tokenizer, messages, format="v1") == case["prompt"], case["name"]
        opened = render(tiny_tokenizer, messages[:-1], generate=True, format="v1")
        assert opened == case["prompt_for_generation"], case["name"]


def test_a_caption_follows_its_image_directly(tiny_tokenizer):
    messages = [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "a bridge"}]
    assert render(tiny_tokenizer, messages, format="plain") == "<image>a bridge\n"


def test_an_image_may_stand_between_start_and_end_marks(tiny_tokenizer):
    prompt = render(tiny_tokenizer, image_question("hi"), image_start_end=True, generate=True)
    assert prompt == "USER: <im_start><image><im_end>\nhi ASSISTANT:"


def test_the_formats_system_text_can_be_replaced(tiny_tokenizer):
    messages = [{"role": "user", "content": "hi"}]
    assert render(tiny_tokenizer, messages) == "USER: hi "
    assert render(tiny_tokenizer, messages, format="v1") == f"{VICUNA_SYSTEM} USER: hi "
    assert render(tiny_tokenizer, messages, format="llava_v1") == f"{LLAVA_SYSTEM} USER: hi "
    assert render(tiny_tokenizer, messages, format="v1", default_system="Be brief.") == "Be brief. USER: hi "
    assert render(tiny_tokenizer, messages, format="v1", default_system="") == "USER: hi "


def test_texts_are_written_as_they_are(tiny_tokenizer):
    """Nothing is trimmed, and what looks like a template in a message is only text."""
    messages = [{"role": "user", "content": " {{ bos_token }}\n "}]
    assert render(tiny_tokenizer, messages) == "USER:  {{ bos_token }}\n  "


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="format='v2' is unknown; use one of v1, vicuna_v1, llava_v1, plain"):
        chat_template(format="v2")
    with pytest.raises(ValueError, match="default_system cannot stand in format='plain'"):
        chat_template("Be brief.", format="plain")


@pytest.mark.parametrize(("format", "role"), [("v1", "tool"), ("plain", "system")])
def test_an_unknown_role_is_named(tiny_tokenizer, format, role):
    with pytest.raises(Exception, match=f"role '{role}' is unknown"):
        render(tiny_tokenizer, [{"role": role, "content": "hi"}], format=format)


@pytest.mark.parametrize("format", ["v1", "plain"])
def test_the_template_itself_refuses_a_part_that_it_cannot_read(tiny_tokenizer, format):
    """Engines render it without the processor."""
    messages = [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]
    with pytest.raises(Exception, match="a part of type 'video' cannot be read; use text, image, image_url"):
        render(tiny_tokenizer, messages, format=format)
    linked = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a.png"}}]}]
    assert render(tiny_tokenizer, linked, format="plain") == "<image>\n\n"
