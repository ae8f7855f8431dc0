"""What a browser may ask of the page's server. gradio offers much more than the page needs; none of it passes.

Files travel in no direction: images come inside of events and are kept in memory, pictures go out as data addresses.
So gradio's routes for uploads, files and proxies are closed, and with them all ways to a file of the server.
"""

from __future__ import annotations

import base64
import json
import re
import secrets
from typing import Any

from starlette.requests import ClientDisconnect

from tokenpacker.serve.http_bodies import read_body
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
        hosts: names by which a page without a password may be called; None allows all. A website that gives its own
            name the address of this machine is refused by it.
    """

    def __init__(self, app: Any, limits: Limits, password: str | None = None, hosts: tuple[str, ...] | None = None):
        self.app, self.limits, self._reading = app, limits, 0
        self.password = None if password is None else b"Basic " + base64.b64encode(password.encode())
        self.hosts = hosts if password is None else None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # the page uses no websockets
        refused = self._refusal(scope, dict(scope["headers"]))
        if refused is not None:
            await _answer(send, *refused)
            return
        if scope["method"] == "POST":
            try:
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
        body = json.dumps(content).encode()
        headers = [
            (name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")
        ]
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def once() -> Any:
            return unread.pop() if unread else await receive()

        return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}, once

    def _refusal(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        allowed = OPEN.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if self.password is not None and not secrets.compare_digest(headers.get(b"authorization", b""), self.password):
            return 401, "a user name and a password are needed"
        if allowed is None or not allowed.fullmatch(scope["path"]) or ".." in scope["path"]:
            return 404, "there is nothing here"
        host = headers.get(b"host", b"")
        if self.hosts is not None and re.sub(rb":\d+$", b"", host).decode("latin-1").lower() not in self.hosts:
            return 403, f"open this page by one of the names {', '.join(self.hosts)}"
        origin = headers.get(b"origin")
        if origin is not None and origin.partition(b"://")[2] != host:
            return 403, "requests of other pages are refused"
        if scope["method"] == "POST" and self._reading >= self.limits.waiting:
            return 503, "the server is busy; try again"
        return None


async def _answer(send: Any, status: int, text: str) -> None:
    length = str(len(text.encode())).encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="tokenpacker", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
