"""vLLM's own server, started with the rules of `tokenpacker serve`, and the openai client."""

from __future__ import annotations

import base64
import io
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest

from tokenpacker.hf import carried_model_path
from vllm_cases import Case, Transformers

KEY = "a key of the test"
START = """
from tokenpacker.hf import carried_model_path
from tokenpacker.serve.server import ServeSettings
from tokenpacker.serve.vllm_server import run_vllm_server

settings = ServeSettings(model="packer", engine="vllm", port={port}, api_key={key!r}, scale_factor=2)
run_vllm_server(settings, carried_model_path(), ["--enforce-eager", "--max-model-len", "2048", "--dtype", "float32"])
"""
STARTUP_S = 600  # a start takes 40 seconds, on a busy machine several times that


@pytest.fixture(scope="module")
def theirs():
    return Transformers(carried_model_path())


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The process and its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [sys.executable, "-c", START.format(port=port, key=KEY)]
    with log.open("wb") as out:
        process = subprocess.Popen(command, env=os.environ | {"VLLM_LOGGING_LEVEL": "INFO"}, stdout=out, stderr=out)
    address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + STARTUP_S
    while True:
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            break
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                process.kill()
                pytest.fail(f"vLLM's server did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
    yield process, address, log
    process.kill()


@pytest.fixture(scope="module")
def client(server):
    openai = pytest.importorskip("openai")
    return openai.OpenAI(base_url=f"{server[1]}/v1", api_key=KEY, max_retries=0)


def data_url(image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(client, urls: list[str], text: str = "what number is in the red box?", **fields):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    fields = {"temperature": 0, "max_tokens": 12, **fields}
    return client.chat.completions.create(model="packer", messages=messages, **fields)


def expected(theirs, images: list, text: str = "what number is in the red box?", **options) -> tuple[str, int, int]:
    """Text, tokens of the prompt, and those of them that belong to images."""
    messages = [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": text}]}]
    prompt = theirs.processor.apply_chat_template(messages, add_generation_prompt=True)
    ids, answer = theirs.answer(Case(prompt, images, options))
    sizes = [(image.height, image.width) for image in images]
    counted = theirs.processor._get_num_multimodal_tokens(image_sizes=sizes, **options)["num_image_tokens"]
    return theirs.processor.tokenizer.decode(answer, skip_special_tokens=True).lstrip(), len(ids), sum(counted)


def test_answers_and_counts_of_tokens_are_those_of_transformers(client, theirs, image_of):
    questions = [
        ([image_of(200, 300)], {}),
        ([image_of(96, 96, 1), image_of(100, 400, 2)], {}),
        ([image_of(200, 300)], {"scale_factor": 3}),
        ([image_of(200, 300)], {"scale_factor": 4, "max_image_tokens": 40}),
        ([], {}),
    ]
    with ThreadPoolExecutor(len(questions)) as pool:
        asked = [
            pool.submit(ask, client, [*map(data_url, images)], extra_body=options) for images, options in questions
        ]
    for (images, options), future in zip(questions, asked, strict=True):
        text, prompt_tokens, image_tokens = expected(theirs, images, **options)
        answer = future.result()
        details = answer.usage.prompt_tokens_details
        assert answer.choices[0].message.content == text
        assert answer.usage.prompt_tokens == prompt_tokens
        assert (getattr(details, "image_tokens", 0) if images else 0) == image_tokens


def test_a_stream_gives_the_same_text_and_the_same_counts(client, theirs, image_of):
    image = image_of(96, 190)
    chunks = list(ask(client, [data_url(image)], stream=True, stream_options={"include_usage": True}))
    text, prompt_tokens, image_tokens = expected(theirs, [image])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    usage = chunks[-1].usage
    assert (usage.prompt_tokens, usage.prompt_tokens_details.image_tokens) == (prompt_tokens, image_tokens)


def test_what_cannot_be_answered_is_a_400_and_names_the_reason(client, image_of):
    import openai

    good = data_url(image_of(20, 20))
    for urls, fields, message in (
        (["http://127.0.0.1/image.png"], {}, "not fetched by this server"),
        ([good[:200] + good[201:]], {}, ""),  # damaged
        ([good], {"extra_body": {"scale_factor": 100}}, "exceeds patch_grid"),
        ([good], {"extra_body": {"scale_facto": 3}}, "scale_factor"),
        ([], {"extra_body": {"scale_factor": 100}}, "exceeds patch_grid"),
        ([good], {"text": "an <image> more"}, "'<image>', which is a token of the model's own"),
        ([], {"text": "an end </s> within"}, "'</s>', which is a token of the model's own"),
        ([good], {"text": "word " * 3000}, ""),
    ):
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            ask(client, urls, **fields)
        assert "Traceback" not in str(refused.value)
        assert str(carried_model_path()) not in str(refused.value)
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, [good], extra_body={"scale_factor": 100})
    assert refused.value.param == "scale_factor"
    assert ask(client, [good]).choices


def test_without_the_key_nothing_is_answered(server, client, image_of):
    import openai

    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="another"), [])
    assert [model.id for model in client.models.list()] == ["packer"]


def test_a_signal_ends_the_server_after_running_requests(server, client, image_of):
    process, _, log = server
    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(ask, client, [data_url(image_of(200, 300, seed))], max_tokens=200) for seed in range(4)]
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    assert all(future.result().choices[0].finish_reason for future in asked)
    written = log.read_text()
    assert "POST /v1/chat/completions" in written
    assert "Route: " not in written
    for secret in (KEY, "red box", "base64"):
        assert secret not in written
