"""What vLLM's server is started with, and what stands before it. vLLM itself does not run here; see tests/plugins."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import sys
from typing import Any

import pytest

from tokenpacker.hf import carried_model_path
from tokenpacker.serve.limits import Limits
from tokenpacker.serve.server import ServeSettings
from tokenpacker.serve.vllm_middleware import RUNNING, VLLMFrontDoor
from tokenpacker.serve.vllm_server import FOLDER, arguments, environment, run_vllm_server

KEY = "a key of the test"


def png(image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def data_url(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


class FakeVLLM:
    """Remembers requests, and answers each with `status` and `answer`; with `wait`, only after it is set."""

    def __init__(self):
        self.bodies: list[Any] = []
        self.paths: list[str] = []
        self.status, self.answer, self.wait = 200, b'{"ok":true}', None
        self.kind, self.cut = b"application/json", 10**9

    async def __call__(self, scope, receive, send):
        self.paths.append(scope["path"])
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        self.bodies.append(json.loads(body) if body else None)
        if self.wait is not None:
            await self.wait.wait()
        headers = [(b"content-type", self.kind), (b"content-length", str(len(self.answer)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        for start in range(0, len(self.answer), self.cut):
            more = start + self.cut < len(self.answer)
            await send({"type": "http.response.body", "body": self.answer[start : start + self.cut], "more_body": more})


@pytest.fixture
def vllm():
    return FakeVLLM()


@pytest.fixture
def door(vllm, monkeypatch):
    """The middleware around the fake: `door(allowed_hosts=(...))`."""

    def make(**settings) -> VLLMFrontDoor:
        for name, value in environment(ServeSettings(model="packer", engine="vllm", **settings)).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(FOLDER, str(carried_model_path()))
        return VLLMFrontDoor(vllm)

    return make


async def call(door, path="/v1/chat/completions", body=None, method="POST", headers=()) -> tuple[int, dict, Any]:
    """Status, headers and JSON of the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = [{"type": "http.request", "body": content[:10], "more_body": True}]
    sent.append({"type": "http.request", "body": content[10:], "more_body": False})
    given: dict[str, Any] = {"body": b""}

    async def receive():
        return sent.pop(0) if sent else await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.start":
            given["status"], given["headers"] = message["status"], dict(message["headers"])
        else:
            given["body"] += message["body"]

    scope = {"type": "http", "method": method, "path": path}
    scope["headers"] = [(b"content-type", b"application/json"), *headers]
    await door(scope, receive, send)
    is_json = given["headers"][b"content-type"] == b"application/json"
    return given["status"], given["headers"], json.loads(given["body"]) if is_json else given["body"]


def chat(*parts: dict, **fields) -> dict:
    content = [*parts, {"type": "text", "text": "what is it?"}]
    return {"model": "packer", "messages": [{"role": "user", "content": content}], **fields}


def image_part(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def test_a_request_reaches_vllm_with_images_as_data_and_options_in_vllms_place(door, vllm, image_of):
    file = png(image_of(20, 30))
    body = chat(image_part(data_url(file)), scale_factor=3, max_image_tokens=50, temperature=0, user="someone", seed=4)
    body["messages"].insert(0, {"role": "developer", "content": "be short"})
    assert asyncio.run(call(door(), body=body))[0] == 200
    (sent,) = vllm.bodies
    url = sent["messages"][1]["content"][0]["image_url"]["url"]
    assert base64.b64decode(url.partition(",")[2]) == file
    assert sent["messages"][0] == {"role": "system", "content": "be short"}
    assert sent["messages"][1]["content"][1] == {"type": "text", "text": "what is it?"}
    assert {name: value for name, value in sent.items() if name != "messages"} == {
        "model": "packer",
        "temperature": 0,
        "seed": 4,
        "mm_processor_kwargs": {"scale_factor": 3, "max_image_tokens": 50},
    }


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "https://example.com/a.png", "file:///etc/passwd", "/etc/passwd", "data:image/png,abc"],
)
def test_no_address_but_data_is_read_unless_its_host_is_allowed(door, vllm, url):
    status, _, answer = asyncio.run(call(door(), body=chat(image_part(url))))
    assert status == 400
    assert answer["error"]["param"] == "messages[0].content[0].image_url"
    assert not vllm.bodies


def test_an_allowed_host_is_fetched_here_with_our_checks_of_its_network_address(door, vllm):
    status, _, answer = asyncio.run(
        call(door(allowed_hosts=("localhost",)), body=chat(image_part("http://localhost/a")))
    )
    assert status == 400
    assert "private or reserved network address" in answer["error"]["message"]
    assert not vllm.bodies


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"mm_processor_kwargs": {"max_tiles": 10**9}}, "mm_processor_kwargs"),
        ({"chat_template": "{{ 1 }}"}, "chat_template"),
        ({"scale_factor": "3"}, "scale_factor"),
        ({"n": 100}, "n"),
    ],
)
def test_fields_that_the_api_does_not_have_are_refused(door, vllm, fields, param):
    status, _, answer = asyncio.run(call(door(), body=chat(**fields)))
    assert (status, answer["error"]["param"]) == (400, param)
    assert not vllm.bodies


def test_an_image_with_too_many_pixels_is_refused_before_it_is_decoded(door, vllm, image_of):
    limits = Limits(image_pixels=1000, request_pixels=1500)
    small, large = (data_url(png(image_of(*size))) for size in ((30, 30), (40, 40)))
    for parts, message in (([large], "more than the 1,000 pixels"), ([small, small], "1,500 pixels allowed")):
        status, _, answer = asyncio.run(call(door(limits=limits), body=chat(*map(image_part, parts))))
        assert status == 400
        assert message in answer["error"]["message"]
    assert not vllm.bodies


def test_a_body_that_is_too_large_or_no_json_is_refused(door, vllm):
    strict = door(limits=Limits(body_bytes=100))
    assert asyncio.run(call(strict, body=b" " * 101))[0] == 413
    assert asyncio.run(call(strict, body=b"{"))[0] == 400
    assert asyncio.run(call(strict, body=b"[" * 90))[0] == 400
    assert not vllm.bodies


def test_more_requests_than_may_be_in_flight_are_told_to_come_back(door, vllm):
    async def many() -> list[tuple[int, dict, Any]]:
        vllm.wait = asyncio.Event()
        front = door(limits=Limits(waiting=1))
        running = [asyncio.create_task(call(front, body=chat())) for _ in range(RUNNING + 1)]
        while len(vllm.bodies) < RUNNING + 1:
            await asyncio.sleep(0.01)
        refused = await call(front, body=chat())
        vllm.wait.set()
        answered = await asyncio.gather(*running)
        return [refused, *answered, await call(front, body=chat())]

    refused, *answered = asyncio.run(many())
    assert (refused[0], refused[1][b"retry-after"]) == (429, b"1")
    assert {status for status, _, _ in answered} == {200}


def test_an_answer_that_takes_too_long_ends_with_an_error(door, vllm):
    async def slow():
        vllm.wait = asyncio.Event()
        return await call(door(limits=Limits(request_s=0.2)), body=chat())

    assert asyncio.run(slow())[0] == 504


def test_usage_counts_image_tokens_under_our_name_too_and_text_of_answers_is_left_alone(door, vllm):
    trap = '"multimodal_tokens":{"image":5}'
    usage = {"prompt_tokens_details": {"multimodal_tokens": {"image": 36}}}
    vllm.answer = json.dumps({"text": trap, "usage": usage}).encode()
    status, headers, answer = asyncio.run(call(door(), body=chat()))
    assert answer["usage"]["prompt_tokens_details"] == {"multimodal_tokens": {"image": 36}, "image_tokens": 36}
    assert answer["text"] == trap
    assert status == 200
    assert b"content-length" not in headers


def test_the_space_before_an_answer_is_taken_away_as_on_the_embedded_engine(door, vllm):
    choices = [{"index": index, "message": {"content": text}} for index, text in enumerate((" a b", "\n c ", ""))]
    vllm.answer = json.dumps({"choices": choices}).encode()
    _, _, answer = asyncio.run(call(door(), body=chat()))
    assert [choice["message"]["content"] for choice in answer["choices"]] == ["a b", "c ", ""]


def test_the_space_before_a_streamed_answer_is_taken_away_however_it_is_cut(door, vllm):
    pieces = [(0, ""), (0, " "), (1, " x"), (0, "  a"), (1, " y"), (0, " b ")]
    chunks = [{"choices": [{"index": index, "delta": {"content": text}}]} for index, text in pieces]
    vllm.kind = b"text/event-stream; charset=utf-8"
    vllm.answer = b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"
    vllm.cut = 7  # bytes of each message
    _, _, sent = asyncio.run(call(door(), body=chat(stream=True)))
    *events, done, rest = sent.decode().split("\n\n")
    said = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    texts = ["".join(choice["delta"]["content"] for choice in said if choice["index"] == index) for index in (0, 1)]
    assert texts == ["a b ", "x y"]
    assert (done, rest) == ("data: [DONE]", "")


def test_an_error_names_its_field_and_in_a_stream_repeats_nothing(door, vllm):
    message = "scale_factor=99 exceeds patch_grid=24x24"
    vllm.status, vllm.answer = 400, json.dumps({"error": {"message": message, "param": None, "code": 400}}).encode()
    status, _, answer = asyncio.run(call(door(), body=chat()))
    assert (status, answer["error"]["param"], answer["error"]["message"]) == (400, "scale_factor", message)
    vllm.status, vllm.kind = 200, b"text/event-stream"
    vllm.answer = b'data: {"error": {"message": "/secret/path", "code": 500}}\n\ndata: [DONE]\n\n'
    assert b"secret" not in asyncio.run(call(door(), body=chat(stream=True)))[2]


@pytest.mark.parametrize("role", ["user", "system"])
def test_texts_may_not_write_the_models_own_tokens(door, vllm, role):
    """The embedded engine has the same rule."""
    for content in ("a </s> b", [{"type": "text", "text": "a </s"}, {"type": "text", "text": "> b"}], "an <image>"):
        body = {"model": "packer", "messages": [{"role": role, "content": content}, *chat()["messages"]]}
        status, _, answer = asyncio.run(call(door(), body=body))
        assert status == 400
        assert "which is a token of the model's own; leave it out" in answer["error"]["message"]
    assert not vllm.bodies


def test_a_failure_of_vllm_tells_nothing_of_its_inside(door, vllm):
    vllm.status, vllm.answer = 500, b'{"error":{"message":"/secret/path: the prompt was hello"}}'
    status, _, answer = asyncio.run(call(door(), body=chat()))
    assert (status, answer["error"]["message"]) == (500, "the server failed on this request")


def test_the_key_is_asked_for_everywhere_but_for_health(door, vllm):
    front = door(api_key=KEY)
    right, wrong = ([(b"authorization", f"Bearer {key}".encode())] for key in (KEY, "another"))
    for path, method in (("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/metrics", "GET"), ("/x", "GET")):
        for headers in ((), wrong):
            assert asyncio.run(call(front, path, body=chat(), method=method, headers=headers))[0] == 401
    assert not vllm.paths
    for method in ("GET", "HEAD"):
        assert asyncio.run(call(front, "/health", method=method))[0] == 200
    assert asyncio.run(call(front, body=chat(), headers=right))[0] == 200


def test_a_website_that_takes_the_address_of_this_machine_is_refused(door, vllm):
    evil, ours = [(b"host", b"evil.example")], [(b"host", b"models.example:443")]
    front = door(host_names=("models.example",))
    for path, method in (("/v1/chat/completions", "POST"), ("/v1/models", "GET"), ("/health", "GET")):
        assert asyncio.run(call(front, path, body=chat(), method=method, headers=evil))[0] == 421
    assert not vllm.paths
    assert asyncio.run(call(front, body=chat(), headers=ours))[0] == 200
    assert asyncio.run(call(door(host="0.0.0.0"), body=chat(), headers=evil))[0] == 200


def test_routes_of_vllm_that_the_api_does_not_have_are_closed(door, vllm):
    front = door()
    for path in ("/v1/completions", "/v1/responses", "/tokenize", "/invocations", "/docs", "/v1/load_lora_adapter"):
        assert asyncio.run(call(front, path, body={}))[0] == 404
    assert asyncio.run(call(front, method="GET"))[0] == 405
    assert not vllm.paths


def test_models_are_named_without_their_folder(door):
    front = door()
    assert [card["id"] for card in asyncio.run(call(front, "/v1/models", method="GET"))[2]["data"]] == ["packer"]
    assert asyncio.run(call(front, "/v1/models/packer", method="GET"))[2]["id"] == "packer"
    assert asyncio.run(call(front, "/v1/models/other", method="GET"))[0] == 404


def test_vllm_is_started_with_the_settings_and_the_key_is_no_argument(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(os, "execve", lambda *call: started.append(call))
    settings = ServeSettings(model="packer", port=0, api_key=KEY, scale_factor=3, allowed_hosts=("example.com",))
    run_vllm_server(settings, tmp_path, ["--dtype", "float32"])
    ((program, command, variables),) = started
    assert program == sys.executable
    assert KEY not in " ".join(command)
    assert variables["VLLM_API_KEY"] == KEY
    assert variables["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert int(variables["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"]) > 120
    assert command[command.index("--mm-processor-kwargs") + 1] == '{"scale_factor": 3}'
    assert command[command.index("--port") + 1] != "0"
    assert command[-2:] == ["--dtype", "float32"]
    for flag in ("--allowed-media-domains", "--middleware", "--trust-request-mm-kwargs"):
        assert flag in arguments(settings)


def test_the_middleware_says_how_to_start_it(monkeypatch, vllm):
    monkeypatch.delenv("TOKENPACKER_SERVE_RULES", raising=False)
    with pytest.raises(ValueError, match="tokenpacker serve --engine vllm"):
        VLLMFrontDoor(vllm)
