"""What is refused, how it is said, and what is not said."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import struct
import zlib
from dataclasses import replace
from unittest import mock

import pytest
from fastapi.testclient import TestClient
from PIL import Image

from fake_engine import FakeEngine, data_url, question
from tokenpacker.projectors import TokenPackerProjectorConfig
from tokenpacker.serve.http_app import build_app
from tokenpacker.serve.limits import Limits
from tokenpacker.serve.openai_schema import RequestError, read_json
from tokenpacker.serve.server import ServeSettings

CHAT = "/v1/chat/completions"
LIMITS = Limits(body_bytes=100_000, image_bytes=50_000, image_pixels=40_000, request_pixels=60_000, messages=3)
SECRET = "squeamish ossifrage"


def client_of(**settings) -> TestClient:
    app = build_app(FakeEngine(), ServeSettings(**{"model": "tiny", "limits": LIMITS, **settings}))
    return TestClient(app, "http://localhost")


@pytest.fixture(scope="module")
def client():
    with client_of() as client:
        yield client


@pytest.fixture
def refused(client, caplog):
    """Sends a request that must fail, and gives its error. Checks its form, and that it repeats nothing of the body."""

    def send(body, status: int = 400, **options):
        caplog.set_level(logging.INFO)
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        headers = {"content-type": "application/json"} | options.pop("headers", {})
        response = client.post(CHAT, content=content, headers=headers, **options)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert SECRET not in response.text + caplog.text
        assert len(error["message"]) < 200
        return error

    return send


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"temperature": 3}, "temperature", "temperature must be less than or equal to 2"),
        ({"temperature": "1"}, "temperature", "temperature must be a valid number"),
        ({"temperature": -0.1}, "temperature", "temperature must be greater than or equal to 0"),
        ({"top_p": 0}, "top_p", "top_p must be greater than 0"),
        ({"seed": 2**64}, "seed", "seed must be less than 9223372036854775808"),
        ({"n": 9}, "n", "n must be at most 8, not 9"),
        ({"n": True}, "n", "n must be a valid integer"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be greater than or equal to 1"),
        ({"max_tokens": 10**6}, "max_tokens", "max_tokens must be at most 4096, not 1000000"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, None, "max_tokens and max_completion_tokens differ"),
        ({"stop": ["a"] * 5}, "stop", "at most 4 texts in stop, not 5"),
        ({"stop": ""}, "stop", "stop must not be empty"),
        ({"temprature": 1}, "temprature", "temprature is not supported; did you mean temperature?"),
        ({"tools": [{"type": "function"}]}, "tools", "tools is not supported; leave it out"),
        ({"logprobs": True}, "logprobs", "logprobs must be false"),
        ({"store": 0}, "store", "store must be a valid boolean"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "frequency_penalty must be less than or equal to 0"),
        ({"response_format": {"type": "json_object"}}, "response_format.type", "must be 'text'"),
        ({"stream_options": {"include_usage": True}}, None, "stream_options need stream=true"),
        ({"messages": []}, "messages", "messages must not be empty"),
        ({"top_k": 5}, "top_k", "top_k is not supported; leave it out"),
        ({"messages": [{"role": "user", "content": SECRET}] * 4}, "messages", "messages must be at most 3, not 4"),
        (
            {"messages": [{"role": SECRET, "content": ""}]},
            "messages[0].role",
            "must be one of 'system', 'developer', 'user'",
        ),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "must be a valid string"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0].content is missing"),
        ({"scale_factor": 0}, "scale_factor", "scale_factor must be a whole number of at least 1, or 'auto'"),
        ({"scale_factor": "3"}, "scale_factor", "scale_factor must be a whole number of at least 1, or 'auto'"),
    ],
)
def test_a_wrong_field_is_named_in_a_sentence(refused, fields, param, message):
    error = refused(question(SECRET, **fields))
    assert message in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_a_missing_model_is_named(refused):
    error = refused({"messages": question()["messages"]})
    assert (error["message"], error["param"]) == ("model is missing; use 'tiny'", "model")


def test_an_image_of_little_detail_is_asked_for_in_tokens(refused):
    body = question("what?", "data:image/png;base64,")
    body["messages"][0]["content"][0]["image_url"]["detail"] = "low"
    error = refused(body)
    assert error["param"] == "messages[0].content[0].image_url.detail"
    assert error["message"].endswith(
        "must be 'auto' or 'high'; max_image_tokens says how many tokens an image may have"
    )


def test_a_value_that_the_model_cannot_take_names_its_field(refused, monkeypatch):
    monkeypatch.setattr(
        FakeEngine,
        "prepare",
        lambda *_: TokenPackerProjectorConfig(vision_dim=64, language_dim=8).resolve_scale((24, 24), 99),
    )
    error = refused(question(scale_factor=99))
    assert (error["param"], error["message"].partition(";")[0]) == (
        "scale_factor",
        "scale_factor=99 exceeds patch_grid=24x24",
    )


def test_fields_with_their_neutral_value_are_taken(client):
    neutral = {"user": "u", "metadata": {"a": "b"}, "store": False, "logprobs": False, "frequency_penalty": 0}
    more = {"presence_penalty": 0.0, "tools": [], "tool_choice": "none", "logit_bias": {}, "top_p": None}
    body = question(**neutral, **more, response_format={"type": "text"}, modalities=["text"])
    assert client.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff", b'{"a": NaN}', b'{"temperature": Infinity}', b'"\\ud800"', b"[" * 100_000, b"9" * 5000],
)
def test_what_is_no_json_is_refused(refused, body):
    assert refused(body)["code"] == "invalid_json"


def test_a_number_beyond_floats_is_refused(refused):
    body = json.dumps(question(temperature=0)).replace('"temperature": 0', '"temperature": 1e999')
    assert refused(body)["message"] == "temperature must be a finite number"


@pytest.mark.parametrize("body", [b"[]", b"1", b"null", b'"text"'])
def test_a_body_that_is_no_object_is_refused(refused, body):
    assert refused(body)["message"] == "the body must be an object"


@pytest.mark.parametrize(
    "body",
    [
        b'{"messages": [' + b"0," * 20_000 + b"0]}",
        json.dumps(dict.fromkeys(map(hex, range(20_001)), 0)),
        b"[" + b"[]," * 500_001 + b"[]]",
    ],
    ids=["of a list", "of an object", "more than are read"],
)
def test_very_many_values_are_refused_before_each_is_described(body):
    with pytest.raises(RequestError, match="the body has more than 20,000 values"):
        read_json(body if isinstance(body, bytes) else body.encode())


def test_a_long_text_with_commas_is_not_taken_for_many_values():
    assert read_json(json.dumps({"text": "," * 200_000}).encode())["text"]


def test_a_body_is_read_up_to_its_limit_even_without_its_length(client, refused):
    assert refused(question("x" * 200_000), 413)["code"] == "limit_exceeded"
    parts = (b" " * 10_000 for _ in range(1000))
    response = client.post(CHAT, content=parts, headers={"content-type": "application/json"})
    assert response.status_code == 413


def test_a_body_of_another_type_is_refused_so_that_no_page_can_send_one_unasked(refused):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert refused(question(), 415, headers={"content-type": kind})["message"].startswith("the body must be JSON")


def png_header(height: int, width: int) -> bytes:
    """A PNG file that says how large it is, and holds nothing."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")]
    packed = [struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def base64_url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


RED = Image.new("RGB", (100, 100), "red")
BAD_IMAGES = {
    "a bomb": (base64_url(png_header(60_000, 60_000)), "more than the 40,000 pixels allowed"),
    "too many pixels": (data_url(Image.new("RGB", (300, 200))), "is 200x300, more than the 40,000 pixels"),
    "too many bytes": (data_url(Image.effect_noise((190, 190), 90), "TIFF") * 2, "more than the 50,000 bytes"),
    "truncated": (data_url(RED)[:-40], "cannot be decoded; save it anew"),
    "cut in its header": (base64_url(png_header(10, 10)[:40]), "is not an image that Pillow can read"),
    "no pixels": (base64_url(png_header(10, 10)), "cannot be decoded; save it anew"),
    "empty": ("data:image/png;base64,", "is not a PNG"),
    "no image": (base64_url(SECRET.encode() * 9), "is not a PNG, JPEG, WebP, GIF or TIFF file"),
    "a drawing": (base64_url(b"<svg xmlns='http://www.w3.org/2000/svg'/>"), "is not a PNG"),
    "a script": (base64_url(b"%!PS-Adobe-3.0 EPSF-3.0\n"), "is not a PNG"),
    "no base64": (f"data:image/png;base64,{SECRET}!", "no valid base64"),
    "another encoding": ("data:image/png,%89PNG", "must be of the form data:image/png;base64,"),
    "a path": ("/etc/passwd", "is no data: and no http(s): address"),
    "a file": ("file:///etc/passwd", "is no data: and no http(s): address"),
    "ftp": ("ftp://example.com/a.png", "is no data: and no http(s): address"),
    "an address": (f"https://example.com/{SECRET}.png", "images are not fetched by this server"),
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_a_bad_image_is_named_by_its_place(refused, name):
    address, message = BAD_IMAGES[name]
    error = refused(question("what is it?", data_url(RED), address))
    assert message in error["message"]
    assert error["param"] == "messages[0].content[1].image_url"
    assert error["code"] == "invalid_image"


def test_the_pixels_of_a_file_that_is_too_large_are_not_decoded(refused):
    """Metadata behind a PNG's pixels tempt Pillow to decode them for its orientation."""
    header = png_header(300, 200)[:-12]
    late = b"tEXt" + b"a\0b"
    content = header + struct.pack(">I", 3) + late + struct.pack(">I", zlib.crc32(late)) + png_header(1, 1)[-12:]
    with mock.patch("PIL.ImageFile.ImageFile.load", side_effect=AssertionError("decoded")) as load:
        assert "more than the 40,000 pixels" in refused(question("what?", base64_url(content)))["message"]
    assert not load.called


def test_a_photo_of_very_many_scans_is_refused(refused):
    """Each takes a few bytes and as long as all pixels, so that a small file could keep a thread for hours."""
    file = io.BytesIO()
    RED.save(file, "JPEG", progressive=True)
    content = file.getvalue()
    scan = content[content.rindex(b"\xff\xda") : -2]
    many = base64_url(content[:-2] + 100 * scan + content[-2:])
    assert "more than 100 scans" in refused(question("what?", many))["message"]


def test_images_are_limited_together(refused):
    error = refused(question("what?", *[data_url(Image.new("RGB", (180, 180)))] * 2))
    assert "more than the 60,000 pixels allowed in a request" in error["message"]


@pytest.mark.filterwarnings("ignore:.*holds several frames")
@pytest.mark.parametrize(
    ("image", "format", "options"),
    [
        (RED.convert("CMYK"), "JPEG", {}),
        (RED.convert("P"), "GIF", {"save_all": True, "append_images": [Image.new("P", (100, 100))]}),
        (Image.new("RGB", (5000, 1)), "PNG", {}),
        (Image.new("RGB", (1, 5000)), "WEBP", {}),
        (RED.convert("RGBA"), "TIFF", {}),
        (Image.new("I;16", (9, 9)), "PNG", {}),
    ],
)
def test_unusual_images_are_read(client, image, format, options):
    response = client.post(CHAT, json=question("what is it?", data_url(image, format, **options)))
    assert response.status_code == 200, response.text
    seen = client.app.state.service.engine.questions[-1].images[0]
    assert (seen.mode, seen.size) == ("RGB", image.size)


def test_the_key_is_asked_of_all_routes_but_health():
    with client_of(api_key="kay") as client:
        for path in ("/v1/models", "/v1/models/tiny", "/metrics", "/openapi.json", "/nothing"):
            for key in (
                {},
                {"authorization": "Bearer wrong"},
                {"authorization": "kay"},
                {"authorization": "Basic kay"},
            ):
                response = client.get(path, headers=key)
                assert response.status_code == 401
                assert response.headers["www-authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
            assert client.get(path, headers={"authorization": "Bearer kay"}).status_code != 401
        assert client.post(CHAT, content=b"{").status_code == 401
        assert client.get("/health").json() == {"status": "ok"}
        assert client.head("/health").status_code == 200


def test_a_wrong_model_is_told_the_one_that_is_served(refused):
    error = refused(question() | {"model": SECRET}, 404)
    assert error["message"] == "this model is not served here; use 'tiny'"
    assert (error["param"], error["code"]) == ("model", "model_not_found")


def test_routes_and_methods_that_do_not_exist_are_errors_in_the_same_form(client):
    assert client.get("/v1/nothing").json()["error"]["message"] == "there is no such route"
    response = client.get(CHAT)
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    assert response.json()["error"]["message"] == "the route does not have this method"


def test_no_page_of_another_origin_is_let_in(client):
    asked = {"origin": "https://example.com", "access-control-request-method": "POST"}
    response = client.options(CHAT, headers=asked)
    assert response.status_code == 405
    assert not any(name.startswith("access-control") for name in response.headers)


def test_a_failure_shows_neither_its_text_nor_the_prompt(refused, caplog):
    error = refused(question("FAIL " + SECRET), 500)
    assert error["message"] == "the server failed on this request"
    assert "a request failed with RuntimeError in" in caplog.text
    assert "the secret of the prompt" not in caplog.text


def test_one_line_is_logged_for_a_request(client, caplog):
    caplog.set_level(logging.INFO, logger="tokenpacker")
    client.post(CHAT, json=question(f"{SECRET} three", data_url(RED)))
    client.get("/v1/models/other?key=" + SECRET)
    client.get("/v1/no%0Aroute")
    client.get("/health")
    lines = [record.getMessage() for record in caplog.records if record.name == "tokenpacker.serve"]
    assert [re.sub(r"[0-9]+ ms", "5 ms", line) for line in lines] == [
        "POST /v1/chat/completions 200, 5 ms, 13 tokens of prompt, 3 of answer",
        "GET /v1/models/other 404, 5 ms",
        r"GET /v1/no\nroute 404, 5 ms",
    ]
    assert SECRET not in caplog.text


def test_the_metrics_count_requests_and_tokens():
    with client_of() as client:
        client.post(CHAT, json=question("one two", data_url(RED)))
        client.post(CHAT, json={})
        found = client.get("/metrics").text
    for line in (
        f'tokenpacker_requests_total{{route="{CHAT}",status="200"}} 1.0',
        f'tokenpacker_requests_total{{route="{CHAT}",status="400"}} 1.0',
        'tokenpacker_tokens_total{kind="prompt"} 12.0',
        'tokenpacker_tokens_total{kind="image"} 10.0',
        'tokenpacker_tokens_total{kind="answer"} 2.0',
        "tokenpacker_first_token_seconds_count 1.0",
        "tokenpacker_waiting 0.0",
    ):
        assert line in found.splitlines()


def test_defaults_of_the_server_hold_where_a_request_names_none():
    with client_of(scale_factor=3, max_image_tokens=50) as client:
        client.post(CHAT, json=question())
        client.post(CHAT, json=question(scale_factor=4))
        client.post(CHAT, json=question(scale_factor="auto"))
        asked = client.app.state.service.engine.questions
    assert [(one.scale_factor, one.max_image_tokens) for one in asked] == [(3, 50), (4, 50), ("auto", 50)]


def test_the_roles_and_parts_of_a_conversation_reach_the_engine(client):
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        question("and this?", data_url(RED))["messages"][0],
    ]
    sent = {"temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "x", "n": 2, "max_tokens": 5}
    assert client.post(CHAT, json={"model": "tiny", "messages": messages, **sent}).status_code == 200
    asked = client.app.state.service.engine.questions[-1]
    assert [message["role"] for message in asked.messages] == ["system", "assistant", "user"]
    assert asked.messages[2]["content"] == [{"type": "image"}, {"type": "text", "text": "and this?"}]
    assert vars(asked.sampling) == sent | {"stop": ("x",)}


def test_a_limit_must_be_positive():
    with pytest.raises(ValueError, match="image_bytes=0 must be positive"):
        replace(LIMITS, image_bytes=0)
    assert replace(LIMITS, redirects=0).redirects == 0


def test_a_website_that_takes_the_address_of_this_machine_is_refused_on_every_route(client):
    for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("GET", "/openapi.json"), ("POST", CHAT)):
        response = client.request(method, path, headers={"host": "evil.example"})
        assert (response.status_code, response.json()["error"]["code"]) == (421, "unknown_host")
    with client_of(host_names=("models.example",)) as proxied:
        assert proxied.get("/health", headers={"host": "models.example"}).status_code == 200
    with client_of(host="0.0.0.0") as public:
        assert public.get("/health", headers={"host": "anything.example"}).status_code == 200
