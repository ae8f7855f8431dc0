"""Thousands of requests that nobody would think of: no failure of the server, no worker that hangs."""

from __future__ import annotations

import base64
import io
import json

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis.specs.openapi.checks import positive_data_acceptance

from fake_engine import FakeEngine, question
from tokenpacker.serve.embedded import EmbeddedEngine
from tokenpacker.serve.http_app import build_app
from tokenpacker.serve.limits import Limits
from tokenpacker.serve.server import ServeSettings

CHAT = "/v1/chat/completions"
LIMITS = Limits(image_pixels=100_000, request_pixels=200_000, request_s=60, max_tokens=4)
FUZZING = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def app_of(engine, **more):
    hosts = ("127.0.0.1", "a.invalid")
    return build_app(engine, ServeSettings(model="tiny", limits=LIMITS, allowed_hosts=hosts, **more))


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def picture_files(draw) -> bytes:
    """An image file of any kind, whole, cut, or with some bytes changed."""
    mode = draw(st.sampled_from(["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"]))
    kinds = {"CMYK": ["JPEG", "TIFF"], "I;16": ["PNG", "TIFF"], "RGBA": ["PNG", "WEBP"], "1": ["PNG", "TIFF"]}
    size = draw(st.sampled_from([(1, 1), (5, 3), (64, 40), (3000, 1), (1, 5000), (400, 400)]))
    file = io.BytesIO()
    Image.new(mode, size).save(file, draw(st.sampled_from(kinds.get(mode, ["PNG", "GIF", "TIFF"]))))
    content = bytearray(file.getvalue())
    for place, value in draw(st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), max_size=4)):
        content[place % len(content)] = value
    return bytes(content[: draw(st.sampled_from([len(content), len(content) // 2, 30]))])


def in_base64(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


addresses = st.one_of(
    picture_files().map(in_base64),
    st.binary(max_size=40).map(in_base64),
    st.text(max_size=30).map("data:image/png;base64,{}".format),
    st.sampled_from(["http://127.0.0.1:1/x.png", "https://a.invalid/", "http://[::1]/", "file:///etc/passwd", "data:"]),
    st.text(max_size=30),
)
words = st.text(max_size=30) | st.sampled_from(["<image>", "</s>", "USER:", "what color?"])
parts = st.one_of(
    st.fixed_dictionaries({"type": st.just("text"), "text": words}),
    st.fixed_dictionaries({"type": st.just("image_url"), "image_url": addresses | addresses.map(lambda a: {"url": a})}),
    junk,
)
messages = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "user", "system", "developer", "assistant", "tool"])},
        optional={"content": words | st.lists(parts, max_size=3) | junk},
    ),
    max_size=4,
)
FIELDS = {
    "max_tokens": st.integers(-1, 5),
    "max_completion_tokens": st.integers(-1, 5),
    "temperature": st.floats(-1, 3),
    "top_p": st.floats(-1, 2),
    "seed": st.integers(-(2**64), 2**64),
    "stop": words | st.lists(words, max_size=5),
    "n": st.integers(-1, 9),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries({}, optional={"include_usage": st.booleans()}),
    "scale_factor": st.integers(-1, 9),
    "max_image_tokens": st.integers(-1, 200),
    "logit_bias": st.dictionaries(words, st.integers(), max_size=1),
    "tools": st.lists(junk, max_size=1),
}
likely = st.fixed_dictionaries(
    {"model": st.sampled_from(["tiny"] * 9 + ["x"]), "messages": messages},
    optional={name: values | st.none() | junk for name, values in FIELDS.items()},
)
sensible = st.builds(
    lambda text, urls, more: question(text, *urls, **more),
    st.sampled_from(["what color?", "a b c"]),
    st.lists(addresses, max_size=2),
    st.fixed_dictionaries({}, optional=FIELDS),
)
bodies = st.one_of(
    sensible.map(json.dumps), likely.map(json.dumps), junk.map(json.dumps), st.binary(max_size=60), st.text(max_size=60)
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["fake", pytest.param("tiny", marks=pytest.mark.slow)])
def test_2000_requests_bring_no_failure_and_no_worker_that_hangs(kind, tiny_model, tiny_processor):
    engine = FakeEngine() if kind == "fake" else EmbeddedEngine(tiny_model, tiny_processor, max_new_tokens=4)
    statuses = set()
    with TestClient(app_of(engine)) as client:

        @FUZZING
        @given(bodies)
        def send(body):
            content = body if isinstance(body, bytes) else body.encode("utf-8", "replace")
            response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
            statuses.add(response.status_code)
            assert response.status_code in (200, 400, 404), response.text
            assert '"internal_error"' not in response.text
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        send()
        assert statuses == {200, 400, 404}
        assert client.post(CHAT, json=question("still there?", max_tokens=1)).status_code == 200
        assert client.app.state.service.preparing == 0
        assert engine.counts().running == engine.counts().waiting == 0
    engine.close(1)


KEY = {"Authorization": "Bearer kay"}
API = schemathesis.openapi.from_asgi("/openapi.json", app_of(FakeEngine(), api_key="kay"), headers=KEY)


@API.parametrize()
@settings(max_examples=50, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_the_openapi_document_is_true(case):
    # A schema cannot say that base64 is an image, nor that stream_options need stream=true.
    case.call_and_validate(headers=KEY, excluded_checks=[positive_data_acceptance])
