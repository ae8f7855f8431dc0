"""Hosts that servers are called by, and bodies that arrive slowly or not at all."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from contextlib import nullcontext

import pytest
from starlette.requests import ClientDisconnect

from fake_engine import FakeEngine, question, serving
from tokenpacker.serve.http_bodies import check_host, read_body
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
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    )
    body = json.dumps(question()).encode()
    with serving(FakeEngine(), limits=Limits(waiting=1, body_s=0.5)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as slow:
            slow.sendall(head % 99 + b"{")
            said = b"".join(iter(lambda: slow.recv(4096), b""))  # up to the end of the connection
        assert said.startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((host, int(port)), timeout=60) as good:
            good.sendall(head % len(body) + body)
            assert good.recv(4096).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(
    ("host", "names", "is_refused"),
    [
        ("localhost:8000", (), False),
        ("LocalHost", (), False),
        ("127.0.0.1:8000", (), False),
        ("127.8.8.8", (), False),
        ("[::1]:8000", (), False),
        ("", (), False),  # no browser; HTTP/1.0 does not need it
        ("models.example", ("models.example",), False),
        ("models.example:443", ("models.example",), False),
        ("evil.example", None, False),
        ("evil.example", ("models.example",), True),
        ("evil.example:8000", (), True),
        ("localhost.evil.example", (), True),
        ("127.0.0.1.evil.example", (), True),
        ("0.0.0.0:8000", (), True),
        ("localhost@evil.example", (), True),
    ],
)
def test_a_host_that_is_neither_this_machine_nor_allowed_is_refused(host, names, is_refused):
    scope = {"headers": [(b"host", host.encode())] if host else []}
    with pytest.raises(RequestError, match="--allow-host NAME") if is_refused else nullcontext() as refused:
        check_host(scope, names)
    assert not is_refused or (refused.value.status, refused.value.code) == (421, "unknown_host")
