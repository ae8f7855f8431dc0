"""What a browser may ask of the page's server. gradio offers much more than the page needs; none of it passes.

Files travel in no direction: images come inside of events and are kept in memory, pictures go out as data addresses.
So gradio's routes for uploads, files and proxies are closed, and with them all ways to a file of the server.
"""

from __future__ import annotations

import base64
import re
import secrets
from typing import Any
from urllib.parse import urlsplit

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
    """An ASGI app in front of the page's: closed routes, limits of size, the password, and headers.

    Args:
        max_bytes: of a request.
        max_waiting: requests that are being read at once.
        password: `user:password`; None lets everybody in.
    """

    def __init__(self, app: Any, max_bytes: int, max_waiting: int, password: str | None = None):
        self.app, self.max_bytes, self.max_waiting, self._reading = app, max_bytes, max_waiting, 0
        self.password = None if password is None else b"Basic " + base64.b64encode(password.encode())

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Passes a request on, or refuses it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return  # the page uses no websockets
        headers = dict(scope["headers"])
        refused = self._refusal(scope, headers)
        if refused is not None:
            status, text = refused
            await _answer(send, status, text)
            return
        received = 0

        async def counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return {"type": "http.disconnect"} if received > self.max_bytes else message

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                ours = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = message | {"headers": [*message["headers"], *ours]}
            await send(message)

        self._reading += scope["method"] == "POST"
        try:
            await self.app(scope, counted, with_headers)
        finally:
            self._reading -= scope["method"] == "POST"

    def _refusal(self, scope: Any, headers: dict[bytes, bytes]) -> tuple[int, str] | None:
        allowed = OPEN.get("GET" if scope["method"] == "HEAD" else scope["method"])
        if self.password is not None and not secrets.compare_digest(headers.get(b"authorization", b""), self.password):
            return 401, "a user name and a password are needed"
        if allowed is None or not allowed.fullmatch(scope["path"]) or ".." in scope["path"]:
            return 404, "there is nothing here"
        origin = headers.get(b"origin")
        if origin is not None and urlsplit(origin).netloc != headers.get(b"host"):
            return 403, "requests of other pages are refused"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.max_bytes:
            return 413, f"a request has at most {self.max_bytes:,} bytes"
        if scope["method"] == "POST" and self._reading >= self.max_waiting:
            return 503, "the server is busy; try again"
        return None


async def _answer(send: Any, status: int, text: str) -> None:
    length = str(len(text.encode())).encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", length), (b"connection", b"close")]
    if status == 401:
        headers.append((b"www-authenticate", b'Basic realm="tokenpacker", charset="UTF-8"'))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
