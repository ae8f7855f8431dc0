"""Requests that wait, fail on the way, are too many, or whose client leaves, on a real server."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from unittest import mock

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from fake_engine import FakeEngine, question, serving, text_of
from tokenpacker.serve.http_app import build_app
from tokenpacker.serve.limits import Limits
from tokenpacker.serve.questions import QueueFullError
from tokenpacker.serve.server import ServeSettings

CHAT = "/v1/chat/completions"


@pytest.fixture
def engine():
    engine = FakeEngine()
    yield engine
    engine.released.set()


@pytest.fixture
def serve(engine):
    """Starts a server for the engine; gives an HTTP client of it."""
    contexts = []

    def start(**settings):
        context = serving(engine, **settings)
        contexts.append(context)
        return httpx.Client(base_url=context.__enter__(), timeout=20)

    yield start
    engine.released.set()
    for context in contexts:
        context.__exit__(None, None, None)


def until(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.01)


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.iter_lines() if line]


def test_a_stream_interleaves_the_answers_and_ends_with_done(serve):
    with serve().stream("POST", CHAT, json=question("a b", stream=True, n=2)) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        *chunks, done = events(response)
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert done == "[DONE]"
    for index in (0, 1):
        deltas = [choice["delta"] for choice in choices if choice["index"] == index]
        assert deltas == [{"role": "assistant", "content": ""}, {"content": "a"}, {"content": " b"}, {}]


def test_a_stream_is_sent_as_it_comes(serve, engine):
    with serve().stream("POST", CHAT, json=question("first WAIT", stream=True)) as response:
        lines = response.iter_lines()
        assert any("first" in line for line in lines)  # before the engine goes on
        engine.released.set()
        assert list(lines)[-2] == "data: [DONE]"


def test_a_failure_before_the_first_token_has_a_status_and_a_later_one_is_an_event(serve):
    client = serve()
    assert client.post(CHAT, json=question("FAIL", stream=True)).status_code == 500
    body = question("first FAIL", stream=True)
    with client.stream("POST", CHAT, json=body) as response:
        *_, error, done = events(response)
    assert json.loads(error)["error"]["code"] == "internal_error"
    assert done == "[DONE]"
    official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.APIError, match="the server failed on this request"):
        list(official.chat.completions.create(**body))


def test_an_answer_that_takes_too_long_ends(serve, engine):
    client = serve(limits=Limits(request_s=0.3))
    late = client.post(CHAT, json=question("WAIT"))
    assert (late.status_code, late.json()["error"]["code"]) == (504, "timeout")
    with client.stream("POST", CHAT, json=question("first WAIT", stream=True)) as response:
        *_, error, _ = events(response)
    assert json.loads(error)["error"]["code"] == "timeout"
    until(lambda: all(ticket.cancelled for ticket in engine.tickets))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(serve, engine, stream):
    client = serve()
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=question("WAIT", stream=stream), timeout=0.3)
    until(lambda: engine.tickets and engine.tickets[0].cancelled)
    with client.stream("POST", CHAT, json=question("first WAIT", stream=True)) as response:
        assert next(response.iter_lines())
    until(lambda: engine.tickets[1].cancelled)
    engine.released.set()
    assert client.post(CHAT, json=question("and on")).status_code == 200
    until(lambda: 'status="499"' in client.get("/metrics").text or stream)


def test_a_full_queue_says_when_to_try_again(serve, engine):
    engine.max_waiting = 1
    client = serve()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, CHAT, json=question("WAIT"))
        until(lambda: engine.tickets)
        second = client.post(CHAT, json=question("too many"))
        engine.released.set()
        assert first.result().status_code == 200
    assert (second.status_code, second.headers["retry-after"]) == (429, "7")
    assert second.json()["error"]["type"] == "rate_limit_error"


def test_a_full_queue_refuses_a_request_before_its_images_are_read(serve, engine, monkeypatch):
    room = [QueueFullError(9), None, None]  # the last for the engine's queue
    monkeypatch.setattr(engine, "check_room", mock.Mock(side_effect=room))
    client = serve()
    refused = client.post(CHAT, json=question())
    assert (refused.status_code, refused.headers["retry-after"], engine.questions) == (429, "9", [])
    assert client.post(CHAT, json=question()).status_code == 200


@pytest.fixture
def reading(engine, monkeypatch) -> Event:
    """Is set once the first request is prepared, which goes on when the engine is released."""
    begun = Event()
    engine.prepared = []

    def prepare(asked):
        engine.prepared.append(asked)
        begun.set()
        assert engine.released.wait(10)
        return FakeEngine.prepare(engine, asked)

    monkeypatch.setattr(engine, "prepare", prepare)
    return begun


def test_requests_that_are_read_at_once_are_limited(serve, engine, reading):
    engine.max_waiting = 1
    client = serve()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, CHAT, json=question())
        assert reading.wait(10)
        assert client.post(CHAT, json=question()).status_code == 429
        engine.released.set()
        assert first.result().status_code == 200
    assert client.post(CHAT, json=question()).status_code == 200


def test_a_client_that_leaves_before_its_question_is_asked_asks_nothing(serve, engine, reading):
    engine.max_waiting = 1
    client = serve()
    with pytest.raises(httpx.ReadTimeout):
        client.post(CHAT, json=question("nobody waits"), timeout=0.3)
    until(lambda: 'status="499"' in client.get("/metrics").text)
    assert client.post(CHAT, json=question()).status_code == 429  # a thread still works on it
    engine.released.set()
    until(lambda: client.post(CHAT, json=question("yes")).status_code == 200)
    assert [text_of(asked.messages[0]) for asked in engine.questions] == ["yes"]


def test_a_request_whose_client_left_before_a_thread_was_free_is_not_prepared(serve, engine, reading, monkeypatch):
    monkeypatch.setattr("tokenpacker.serve.http_app.PREPARING_THREADS", 1)
    engine.max_waiting = 2
    client = serve()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, CHAT, json=question("first"))
        assert reading.wait(10)
        with pytest.raises(httpx.ReadTimeout):
            client.post(CHAT, json=question("nobody waits"), timeout=0.3)
        until(lambda: 'status="499"' in client.get("/metrics").text)
        third = pool.submit(client.post, CHAT, json=question("third"))  # there is room for it
        engine.released.set()
        assert first.result().status_code == 200
        assert third.result().status_code == 200
    assert [text_of(asked.messages[0]) for asked in engine.prepared] == ["first", "third"]


def test_the_official_client_tries_again_after_a_full_queue(serve, engine, monkeypatch):
    client = serve()
    engine.max_waiting = 0
    official = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="none", max_retries=1)
    monkeypatch.setattr("time.sleep", lambda seconds: setattr(engine, "max_waiting", seconds))
    assert official.chat.completions.create(**question("yes")).choices[0].message.content == "yes"
    assert 7 <= engine.max_waiting < 8


def test_many_requests_at_once_get_each_its_own_answer(serve):
    client = serve()
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda n: client.post(CHAT, json=question(f"answer {n}")).json(), range(64)))
    assert [one["choices"][0]["message"]["content"] for one in answers] == [f"answer {n}" for n in range(64)]


def test_a_server_that_ends_refuses_new_requests(serve, engine):
    client = serve()
    engine.closed = True
    response = client.post(CHAT, json=question())
    assert (response.status_code, response.headers["retry-after"]) == (503, "30")
    assert response.json()["error"]["code"] == "shutting_down"


def test_a_server_that_drains_is_not_healthy():
    app = build_app(FakeEngine(), ServeSettings(model="tiny"))
    with TestClient(app, "http://localhost") as client:
        assert client.get("/health").status_code == 200
        app.state.service.draining = True
        for response in (client.get("/health"), client.post(CHAT, json=question())):
            assert (response.status_code, response.headers["retry-after"]) == (503, "30")
        assert client.get("/v1/models").status_code == 200
