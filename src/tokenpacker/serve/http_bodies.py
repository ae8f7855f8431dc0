"""What all servers check of a request before they read its JSON: its host, its key, its type, its size and its pace."""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from ipaddress import ip_address
from typing import Any

from starlette.requests import ClientDisconnect

from tokenpacker.serve.limits import Limits
from tokenpacker.serve.openai_schema import RequestError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]


def is_loopback(host: str) -> bool:
    """Whether a name or an address means this machine itself."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(scope: Message, names: Collection[str] | None) -> None:
    """Raises RequestError for a request to another host than this machine itself or `names`. None allows all.

    A website can give its own name the address of this machine (DNS rebinding). The browser of a visitor then sends its
    requests here, with that name in Host.
    """
    host = re.sub(r":\d*$", "", _header(scope, b"host").decode("latin-1")).strip("[]").lower()
    if names is None or not host or host in names or is_loopback(host):  # browsers always send one
        return
    rule = "this server is called as localhost; to call it by another name, start it with --allow-host NAME"
    raise RequestError(rule, status=421, code="unknown_host")


def check_key(scope: Message, key: str | None) -> None:
    """Raises RequestError for a request without the key. None lets everybody in."""
    if key is None:
        return
    scheme, _, given = _header(scope, b"authorization").partition(b" ")
    if not hmac.compare_digest(given.strip(), key.encode()) or scheme.lower() != b"bearer":
        rule = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
        raise RequestError(rule, status=401, code="invalid_api_key")


async def read_body(scope: Message, receive: Receive, limits: Limits) -> bytes:
    """Reads a body of JSON, within `body_bytes`, and as fast as `body_s` and `body_rate` ask for.

    Raises:
        RequestError: for another type, and as soon as the body is too large or too slow.
        ClientDisconnect: if the client left.
    """
    if _header(scope, b"content-type").partition(b";")[0].strip().lower() != b"application/json":
        raise RequestError("the body must be JSON; send 'Content-Type: application/json'", status=415)
    length = _header(scope, b"content-length")
    size, start, body = int(length) if length.isdigit() else 0, time.monotonic(), bytearray()
    while max(size, len(body)) <= limits.body_bytes:
        allowed = min(limits.body_s + len(body) / limits.body_rate, limits.request_s)
        try:
            message = await asyncio.wait_for(receive(), start + allowed - time.monotonic())
        except asyncio.TimeoutError:
            rule = f"the body must arrive within {limits.body_s:g} s, or with {limits.body_rate:,} bytes a second"
            raise RequestError(f"{rule}; send smaller images", status=408, code="timeout") from None
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        body += message.get("body", b"")
        if not message.get("more_body"):
            break
    if max(size, len(body)) > limits.body_bytes:
        rule = f"the body has more than the {limits.body_bytes:,} bytes allowed; send smaller images"
        raise RequestError(rule, status=413, code="limit_exceeded")
    return bytes(body)


def _header(scope: Message, name: bytes) -> bytes:
    return next((value for known, value in scope["headers"] if known == name), b"")
