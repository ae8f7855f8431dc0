"""Thousands of requests that nobody would think of: no failure of the server, no worker that hangs."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter

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
FUZZING = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def app_of(engine, **more):
    hosts = ("127.0.0.1", "a.invalid")
    names = ("testserver",)  # as test clients call it
    return build_app(engine, ServeSettings(model="tiny", limits=LIMITS, allowed_hosts=hosts, host_names=names, **more))


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@st.composite
def picture_files(draw, whole: bool = False) -> bytes:
    """An image file of any kind, whole, cut, or with some bytes changed."""
    mode = draw(st.sampled_from(["RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"]))
    kinds = {"CMYK": ["JPEG", "TIFF"], "I;16": ["PNG", "TIFF"], "RGBA": ["PNG", "WEBP"], "1": ["PNG", "TIFF"]}
    size = draw(st.sampled_from([(1, 1), (5, 3), (64, 40), (3000, 1), (1, 5000), (400, 400)]))
    file = io.BytesIO()
    Image.new(mode, size).save(file, draw(st.sampled_from(kinds.get(mode, ["PNG", "GIF", "TIFF"]))))
    content = bytearray(file.getvalue())
    for place, value in draw(st.just([]) if whole else st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)))):
        content[place % len(content)] = value
    return bytes(content if whole else content[: draw(st.sampled_from([len(content), len(content) // 2, 30]))])


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
GOOD_FIELDS = {
    "max_tokens": st.integers(1, 4),
    "temperature": st.floats(0, 2),
    "top_p": st.floats(0, 1, exclude_min=True),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "stop": st.lists(st.text(min_size=1, max_size=5), max_size=4),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
    "scale_factor": st.integers(1, 4),
}
likely = st.fixed_dictionaries(
    {"model": st.sampled_from(["tiny"] * 9 + ["x"]), "messages": messages},
    optional={name: values | st.none() | junk for name, values in FIELDS.items()},
)


def chats(pictures, fields):
    texts = st.sampled_from(["what color?", "a b c"])
    more = st.fixed_dictionaries({}, optional=fields)
    return st.builds(
        lambda text, urls, more: question(text, *urls, **more), texts, st.lists(pictures, max_size=2), more
    )


good, broken = chats(picture_files(whole=True).map(in_base64), GOOD_FIELDS), chats(addresses, FIELDS)
bodies = st.one_of(
    *(strategy.map(json.dumps) for strategy in (good, good, broken, likely, junk)),
    st.binary(max_size=60),
    st.text(max_size=60),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "count"), [("fake", 500), pytest.param("tiny", 2000, marks=pytest.mark.slow)])
def test_many_requests_bring_no_failure_and_no_worker_that_hangs(kind, count, tiny_model, tiny_processor):
    engine = FakeEngine() if kind == "fake" else EmbeddedEngine(tiny_model, tiny_processor, max_new_tokens=4)
    statuses: Counter[int] = Counter()
    with TestClient(app_of(engine)) as client:

        @settings(FUZZING, max_examples=count)
        @given(bodies)
        def send(body):
            content = body if isinstance(body, bytes) else body.encode("utf-8", "replace")
            response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
            statuses[response.status_code] += 1
            assert response.status_code in (200, 400, 404), response.text
            assert '"internal_error"' not in response.text
            if response.status_code != 200:
                assert set(response.json()["error"]) == {"message", "type", "param", "code"}

        send()
        assert statuses.total() >= count
        assert statuses[200] > count / 5, statuses  # many pass all checks
        assert client.post(CHAT, json=question("still there?", max_tokens=1)).status_code == 200
        assert client.app.state.service.preparing == 0
        assert engine.counts().running == engine.counts().waiting == 0
    engine.close(1)


KEY = {"Authorization": "Bearer kay"}
API = schemathesis.openapi.from_asgi("/openapi.json", app_of(FakeEngine(), api_key="kay"), headers=KEY)


@API.parametrize()
@settings(FUZZING, max_examples=50)
def test_the_openapi_document_is_true(case):
    # A schema cannot say that base64 is an image, nor that stream_options need stream=true.
    case.call_and_validate(headers=KEY, excluded_checks=[positive_data_acceptance])
