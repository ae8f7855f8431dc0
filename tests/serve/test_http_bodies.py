"""Bodies that arrive slowly or not at all, as both servers read them."""

from __future__ import annotations

import asyncio
import json
import socket
import time

import pytest
from starlette.requests import ClientDisconnect

from fake_engine import FakeEngine, question, serving
from tokenpacker.serve.http_bodies import read_body
from tokenpacker.serve.limits import Limits
from tokenpacker.serve.openai_schema import RequestError

SCOPE = {"headers": [(b"content-type", b"application/json")]}


def read(parts: int, every_s: float, size: int = 1000, **limits) -> bytes:
    """Reads a body of which a part of `size` bytes arrives every `every_s` seconds."""
    left = [parts]

    async def receive():
        await asyncio.sleep(every_s)
        left[0] -= 1
        return {"type": "http.request", "body": b" " * size, "more_body": left[0] > 0}

    return asyncio.run(read_body(SCOPE, receive, Limits(**limits)))


def test_a_body_may_take_longer_if_much_of_it_arrives():
    assert len(read(20, 0.02, body_s=0.2, body_rate=1000)) == 20_000
    with pytest.raises(RequestError, match=r"must arrive within 0.2 s, or with 100,000 bytes a second") as slow:
        read(20, 0.02, body_s=0.2, body_rate=100_000)
    assert (slow.value.status, slow.value.code) == (408, "timeout")


def test_no_body_may_take_longer_than_a_request():
    start = time.monotonic()
    with pytest.raises(RequestError, match="must arrive within"):
        read(1000, 0.02, body_s=0.1, body_rate=1, request_s=0.3)
    assert time.monotonic() - start < 5


def test_a_client_that_leaves_is_noticed():
    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(ClientDisconnect):
        asyncio.run(read_body(SCOPE, receive, Limits()))


def test_a_slow_body_gives_its_place_to_the_next_and_its_connection_is_closed():
    head = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    body = json.dumps(question()).encode()
    with serving(FakeEngine(), limits=Limits(waiting=1, body_s=0.5)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(head % 99 + b"{")
            said = b"".join(iter(lambda: slow.recv(4096), b""))  # up to the end of the connection
        assert said.startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((host, int(port)), timeout=10) as good:
            good.sendall(head % len(body) + body)
            assert good.recv(4096).startswith(b"HTTP/1.1 200 ")
