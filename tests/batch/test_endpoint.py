from __future__ import annotations

import email.utils
import json
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from batch_files import completion, request, texts
from tokenpacker.batch import endpoint
from tokenpacker.batch.batch_rows import RowError
from tokenpacker.batch.endpoint import Endpoint

DROP, GOOD = 0, 200


class Server(ThreadingHTTPServer):
    """An endpoint that echoes questions, after the statuses that `plan` lists for a question."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.plan: dict[str, list[int]] = {}
        self.headers: dict[str, str] = {}
        self.asked: Counter[str] = Counter()
        self.seen: list[tuple[str, str | None]] = []
        self.lock = threading.Lock()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        with self.server.lock:
            self.server.asked[question] += 1
            self.server.seen.append((self.path, self.headers.get("Authorization")))
            plan = self.server.plan.get(question, [])
            status = plan.pop(0) if plan else GOOD
        if status == DROP:
            self.close_connection = True
            self.connection.close()
            return
        content = completion(question) if status == GOOD else {"error": {"message": f"status {status}"}}
        raw = b"<html>" if status == 203 else json.dumps(content).encode()
        self.send_response(GOOD if status == 203 else status)
        for name, value in {"x-request-id": "req-1", **self.server.headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *args):
        pass

    def handle_error(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 0.001)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def body(question: str) -> dict:
    return {"messages": [{"role": "user", "content": question}]}


def test_rows_are_answered_in_order_by_an_endpoint_that_often_fails(files, server):
    questions = [f"question {number}" for number in range(40)]
    files.write(*(request(question, question) for question in questions))
    trouble = [[429], [500], [503, 429], [DROP], [DROP, 500], [408]]
    server.plan = {question: list(trouble[number % 7]) for number, question in enumerate(questions) if number % 7 < 6}
    summary, rows = files.run(Endpoint(server.url), concurrency=8)
    assert texts(rows) == questions
    assert (summary.errors, rows[0]["response"]["request_id"]) == (0, "req-1")
    assert server.asked["question 2"] == 3
    assert server.asked["question 6"] == 1


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refused_request_is_not_sent_again(server, status):
    server.plan["q"] = [status]
    reply = Endpoint(server.url)(body("q"))
    assert (reply.status_code, reply.body) == (status, {"error": {"message": f"status {status}"}})
    assert server.asked["q"] == 1


def test_the_last_failure_is_the_answer(server):
    server.plan["q"] = [500, 500, 503]
    assert Endpoint(server.url, retries=2)(body("q")).status_code == 503


def test_a_request_whose_connection_always_breaks_has_no_answer(server):
    server.plan["q"] = [DROP] * 3
    with pytest.raises(RowError, match="no answer in 3 tries"):
        Endpoint(server.url, retries=2)(body("q"))


def test_an_answer_that_is_no_json_is_an_error_row(server):
    server.plan["q"] = [203]
    with pytest.raises(RowError, match="no JSON object: '<html>'"):
        Endpoint(server.url)(body("q"))


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_the_server_says_how_long_to_wait(server, monkeypatch, form):
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    server.headers["Retry-After"] = "7" if form == "seconds" else email.utils.formatdate(time.time() + 7, usegmt=True)
    server.plan["q"] = [429]
    assert Endpoint(server.url)(body("q")).status_code == GOOD
    assert len(waits) == 1
    assert 5 < waits[0] <= 7


@pytest.mark.parametrize("said", ["soon", "-3", "nan"])
def test_a_wait_that_makes_no_sense_is_ignored(server, said):
    server.headers["Retry-After"] = said
    server.plan["q"] = [429]
    assert Endpoint(server.url)(body("q")).status_code == GOOD


def test_waits_grow_up_to_a_limit(server, monkeypatch):
    waits = []
    monkeypatch.setattr(endpoint.time, "sleep", waits.append)
    monkeypatch.setattr(endpoint, "FIRST_WAIT_S", 1.0)
    server.plan["q"] = [500] * 8
    Endpoint(server.url, retries=8)(body("q"))
    ceilings = [1, 2, 4, 8, 16, 30, 30, 30]
    assert all(ceiling / 2 <= wait <= ceiling for wait, ceiling in zip(waits, ceilings, strict=True))


def test_the_address_may_lack_its_version_but_keeps_its_path(server):
    for url, path in (("", "/v1"), ("/", "/v1"), ("/v1/", "/v1"), ("/openai/v2", "/openai/v2")):
        Endpoint(server.url + url, api_key="secret")(body("q"))
        assert server.seen[-1] == (f"{path}/chat/completions", "Bearer secret")


def test_trouble_that_lasts_is_told_once_and_not_each_time(server, unused_port):
    said = []
    endpoint = Endpoint(server.url, note=said.append)
    server.plan = {"once": [503], "often": [503] * 5}
    endpoint(body("once"))
    assert not said
    endpoint(body("often"))
    assert said == [f"{server.url}/v1/chat/completions answers 503; trying again, 7 more times"]
    gone = Endpoint(f"http://127.0.0.1:{unused_port}", retries=4, note=said.append)
    with pytest.raises(ConnectionError):
        gone(body("q"))
    assert len(said) == 2
    assert "cannot be reached (" in said[1]


def test_half_a_character_can_be_sent(server):
    assert Endpoint(server.url)(body("\ud83d")).body["choices"][0]["message"]["content"] == "\ud83d"


def test_a_refused_key_ends_the_run_and_its_rows_are_kept(files, server):
    files.write(request("a", "a"), request("b", "b"), request("c", "c"))
    server.plan["b"] = [401]
    with pytest.raises(ConnectionError, match=r"refuses the key .*--api-key-env; the rows written so far are kept"):
        files.run(Endpoint(server.url), concurrency=1)
    summary, rows = files.run(Endpoint(server.url), concurrency=1)
    assert (summary.kept, texts(rows)) == (1, ["a", "b", "c"])


def test_an_endpoint_that_is_gone_ends_the_run(files, server, unused_port):
    files.write(request("a"))
    with pytest.raises(ConnectionError, match=r"cannot be reached .*the same command goes on"):
        files.run(Endpoint(f"http://127.0.0.1:{unused_port}", retries=1))
    assert files.target.read_bytes() == b""


@pytest.fixture
def unused_port():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        return server.server_port


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", ""])
def test_an_address_that_is_none_is_refused(url):
    with pytest.raises(ValueError, match="is no address; write for example http://localhost:8000/v1"):
        Endpoint(url)
