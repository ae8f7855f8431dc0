"""What a browser may ask of the page's server. gradio offers much more than the page needs; none of it passes.

Files travel in no direction: images come inside of events and are kept in memory, pictures go out as data addresses.
So gradio's routes for uploads, files and proxies are closed, and with them all ways to a file of the server.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from collections.abc import Collection
from typing import Any

from starlette.requests import ClientDisconnect

from tokenpacker.serve.http_bodies import check_host, read_body
from tokenpacker.serve.limits import Limits
from tokenpacker.serve.openai_schema import RequestError, read_json

OPEN = {
    "GET": re.compile(
        r"/|/theme\.css|/favicon\.ico|/manifest\.json|/(assets|static)/[\w./@-]+"
        r"|/gradio_api/(queue/data|heartbeat/\w+)"
    ),
    "POST": re.compile("/gradio_api/queue/join"),
}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline';"
    " script-src 'self' 'unsafe-inline' 'unsafe-eval'; font-src 'self' data:; frame-ancestors 'none';"
    " form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",  # the address may hold the key of a conversation
}


class Gate:
    """An ASGI app in front of the page's: closed routes, limits of size and pace, the password, and headers.

    Args:
        limits: for the size and the pace of a request; at most `waiting` are read at once.
        password: `user:password`; None lets everybody in.
        hosts: names by which the page may be called beside those of this machine itself; None allows all.
        events: numbers of the events that the page has; None allows all.
    """

    def __init__(
        self,
        app: Any,
        limits: Limits,
        password: str | None = None,
        hosts: Collection[str] | None = None,
        events: Collection[int] | None = None,
    ):
        self.app, self.limits, self.hosts, self.events, self._reading = app, limits, hosts, events, 0
        self.password = None if password is None else b"Basic " + base64.b64encode(password.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # the page uses no websockets
        try:
            self._check(scope, dict(scope["headers"]))
            if scope["method"] == "POST":
                scope, receive = await self._read(scope, receive)
        except RequestError as error:
            await _answer(send, error.status, error.message)
            return
        except ClientDisconnect:
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *ours]}
            await send(message)

        await self.app(scope, receive, with_headers)

    async def _read(self, scope: Any, receive: Any) -> tuple[Any, Any]:
        """An event of the page that was read and checked, as a request that gradio reads again.

        gradio opens whatever file or address a value of a component names, even one that nobody uploaded. The page
        sends plain values only, so nothing else passes.
        """
        self._reading += 1
        try:
            content = read_json(await read_body(scope, receive, self.limits))
        finally:
            self._reading -= 1
        data = content.get("data") if isinstance(content, dict) else None
        if not isinstance(data, list) or not all(
            value is None or isinstance(value, str | int | float) for value in data
        ):
            raise RequestError("the values of an event must be plain texts and numbers; reload the page")
        if self.events is not None and content.get("fn_index") not in self.events:
            raise RequestError("the page has no such event; reload the page")
        body = json.dumps(content).encode()
        headers = [
            (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")
        ]
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def once() -> Any:
            return unread.pop() if unread else await receive()

        return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}, once

    def _check(self, scope: Any, headers: dict[bytes, bytes]) -> None:
        """Raises RequestError for what is refused before its body is read."""
        allowed = OPEN.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if self.password is not None and not secrets.compare_digest(headers.get(b"authorization", b""), self.password):
            raise RequestError("a user name and a password are needed", status=401)
        if allowed is None or not allowed.fullmatch(scope["path"]) or ".." in scope["path"]:
            raise RequestError("there is nothing here", status=404)
        check_host(scope, self.hosts)
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != headers.get(b"host", b""):
            raise RequestError("requests of other pages are refused", status=403)
        if scope["method"] == "POST" and self._reading >= self.limits.waiting:
            raise RequestError("the server is busy; try again", status=503)


async def _answer(send: Any, status: int, text: str) -> None:
    length = str(len(text.encode())).encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="tokenpacker", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
