"""The official clients against a real server with the carried model."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from PIL import Image, ImageDraw

from fake_engine import data_url, question, serving
from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor, carried_model_path
from tokenpacker.serve.chat_requests import ChatRules, answer
from tokenpacker.serve.embedded import EmbeddedEngine

COLOR = "what color is the box?"


def box(color: str) -> str:
    image = Image.new("RGB", (192, 192), "white")
    ImageDraw.Draw(image).rectangle((40, 40, 150, 150), fill=color)
    return data_url(image)


@pytest.fixture(scope="module")
def engine():
    folder = carried_model_path()
    model = TokenPackerForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    engine = EmbeddedEngine(model, TokenPackerProcessor.from_pretrained(folder))
    yield engine
    engine.close(1)


@pytest.fixture(scope="module")
def address(engine):
    with serving(engine) as address:
        yield f"{address}/v1"


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def ask(client):
    return lambda *args, **fields: client.chat.completions.create(**question(*args, **{"temperature": 0, **fields}))


def test_an_image_is_seen_and_its_tokens_are_counted(ask, engine):
    red, blue = ask(COLOR, box("red")), ask(COLOR, box("blue"))
    assert "red" in red.choices[0].message.content
    assert "blue" in blue.choices[0].message.content
    expected = engine.processor.image_layout((192, 192)).num_tokens
    assert red.usage.prompt_tokens_details.image_tokens == expected
    assert red.usage.total_tokens == red.usage.prompt_tokens + red.usage.completion_tokens


def test_an_image_that_was_seen_before_comes_from_the_cache(ask):
    first, second, smaller = (
        ask(COLOR, box("green"), n=2, extra_body=options).usage.prompt_tokens_details
        for options in ({}, {}, {"scale_factor": 3})
    )
    assert (first.cached_tokens, smaller.cached_tokens) == (0, 0)
    separators = 10  # between and after the rows of tiles
    assert second.cached_tokens == second.image_tokens - separators


def test_a_larger_scale_factor_or_a_budget_makes_fewer_image_tokens(ask, engine):
    for options in ({"scale_factor": 3}, {"max_image_tokens": 100}):
        usage = ask(COLOR, box("red"), extra_body=options).usage
        expected = engine.processor.image_layout((192, 192), **options).num_tokens
        assert usage.prompt_tokens_details.image_tokens == expected < 370


def test_auto_gives_tiles_without_detail_one_token(ask, engine):
    blank = Image.new("RGB", (192, 192), "white")
    usage = ask(COLOR, data_url(blank), extra_body={"scale_factor": "auto"}).usage
    assert usage.prompt_tokens_details.image_tokens == 20  # of ten tiles with their separators


def test_the_stream_spells_the_same_answer_and_ends_with_its_usage(ask):
    whole = ask(COLOR, box("red"), box("blue"))
    chunks = list(ask(COLOR, box("red"), box("blue"), stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage


def test_a_seed_repeats_drawn_answers_and_n_gives_several(ask):
    first, second = (ask("say something", temperature=2, seed=7, n=3, max_tokens=8) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1


def test_a_stop_text_ends_the_answer_before_it(ask):
    whole = ask(COLOR, box("red")).choices[0].message.content
    word = whole.split()[-1]
    stopped = ask(COLOR, box("red"), stop=word).choices[0]
    assert stopped.message.content == whole[: whole.index(word)]
    assert stopped.finish_reason == "stop"


def test_a_short_answer_says_that_it_was_cut(ask):
    cut = ask(COLOR, box("red"), max_completion_tokens=1)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 1)


def test_an_answer_can_be_sent_back_as_the_client_holds_it(client):
    body = question(COLOR, box("red"), temperature=0)
    reply = client.chat.completions.create(**body).choices[0].message
    again = [*body["messages"], reply, {"role": "user", "content": COLOR}]
    answered = client.chat.completions.create(**body | {"messages": again})
    assert answered.usage.prompt_tokens > 370


def test_the_model_is_listed(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "tokenpacker"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


def test_a_mistake_is_the_clients_own_kind_of_error(ask):
    with pytest.raises(openai.BadRequestError) as error:
        ask(COLOR, box("red"), extra_body={"max_image_tokens": 1})
    assert "max_image_tokens=1 is too small" in error.value.message
    with pytest.raises(openai.BadRequestError, match="which is a token of the model's own"):
        ask("what is <image>?")


@pytest.mark.slow  # to import it takes seconds
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_litellm_answers_and_streams(address, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network at import
    litellm = pytest.importorskip("litellm")
    body = question(COLOR, box("red"), temperature=0) | {"model": "openai/tiny"}
    where = {"api_base": address, "api_key": "none", "num_retries": 0}
    whole = litellm.completion(**body, **where)
    streamed = litellm.completion(**body, **where, stream=True)
    text = whole.choices[0].message.content
    assert "".join(chunk.choices[0].delta.content or "" for chunk in streamed) == text
    assert whole.usage.prompt_tokens_details.image_tokens == 370


def test_a_batch_gives_the_answer_of_the_server(engine, ask):
    status, offline = answer(engine, question(COLOR, box("red"), temperature=0), ChatRules())
    served = json.loads(ask(COLOR, box("red")).to_json())
    assert status == 200
    assert offline["choices"] == served["choices"]
    assert offline["usage"] == served["usage"]
