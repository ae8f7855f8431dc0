"""What stands before vLLM's routes, so that both engines have the same API: fields, limits, addresses, key, errors.

A request is read by the rules of the embedded engine. It goes on to vLLM with every image as data, and with
`scale_factor` and `max_image_tokens` where vLLM wants them. Plain `vllm serve FOLDER` has all that vLLM has.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.requests import ClientDisconnect

from tokenpacker.serve.chat_requests import ChatRules, check_model, read_request
from tokenpacker.serve.http_bodies import Message, Receive, check_key, read_body
from tokenpacker.serve.openai_schema import ChatRequest, ImagePart, RequestError, read_json
from tokenpacker.serve.picture_sources import PictureError, check_picture_file, read_address
from tokenpacker.serve.vllm_server import settings_from_environment

Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

RUNNING = 256  # requests that vLLM may run at once; as many as `Limits.waiting` wait beside them
CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
SAMPLING = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "stream"}
IMAGE_TOKENS = re.compile(rb'"multimodal_tokens":\{"image":(\d+)\}')  # text of answers has \" for "


class VLLMFrontDoor:
    """ASGI middleware for vLLM's `--middleware`."""

    def __init__(self, app: App):
        self.app, self.settings = app, settings_from_environment()
        self.in_flight = 0
        self.card = {
            "id": self.settings.model,
            "object": "model",
            "created": int(time.time()),
            "owned_by": "tokenpacker",
        }

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Answers, refuses or passes on."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        try:
            await self._route(scope, receive, send)
        except RequestError as error:
            await _answer(send, error.status, error.body(), error.retry_after_s)
        except ClientDisconnect:
            pass

    async def _route(self, scope: Message, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"].rstrip("/")
        if path != HEALTH:
            check_key(scope, self.settings.api_key)
        if path == CHAT and method == "POST":
            await self._chat(scope, receive, send)
        elif path == MODELS and method == "GET":
            await _answer(send, 200, {"object": "list", "data": [self.card]})
        elif path.startswith(f"{MODELS}/") and method == "GET":
            check_model(path.removeprefix(f"{MODELS}/"), self.settings.model)
            await _answer(send, 200, self.card)
        elif path in (HEALTH, METRICS) and method == "GET":
            await self.app(scope, receive, send)
        else:
            known = path in (CHAT, MODELS, HEALTH, METRICS)
            message = "the route does not have this method" if known else "there is no such route"
            raise RequestError(message, status=405 if known else 404)

    async def _chat(self, scope: Message, receive: Receive, send: Send) -> None:
        limits, answer = self.settings.limits, _Answer(send)
        if self.in_flight >= RUNNING + limits.waiting:
            raise RequestError(
                "the server is busy; try again in 1 seconds", status=429, code="queue_full", retry_after_s=1
            )
        self.in_flight += 1
        try:
            await asyncio.wait_for(self._pass_on(scope, receive, answer.send), limits.request_s)
        except asyncio.TimeoutError:
            if not answer.started:
                rule = "the answer took longer than allowed; ask for fewer tokens"
                raise RequestError(rule, status=504, code="timeout") from None
        finally:
            self.in_flight -= 1
        if answer.failed:
            raise RequestError("the server failed on this request", status=500, code="internal_error")

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, self.settings.limits)
        body = await asyncio.to_thread(translate, body, self.settings)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        headers = [(name, value) for name, value in scope["headers"] if name not in (b"content-length",)]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, replay, send)


class _Answer:
    """Passes vLLM's answer on. Counts of image tokens get our name too; a failure of the server is kept back."""

    def __init__(self, send: Send):
        self._send = send
        self.started = self.failed = False

    async def send(self, message: Message) -> None:
        """An ASGI `send`."""
        if message["type"] == "http.response.start":
            self.failed = message["status"] >= 500
            kept = [(name, value) for name, value in message["headers"] if name.lower() != b"content-length"]
            message = {**message, "headers": kept}
        elif message["type"] == "http.response.body":
            message = {**message, "body": IMAGE_TOKENS.sub(rb'\g<0>,"image_tokens":\1', message.get("body", b""))}
        if not self.failed:
            self.started = True
            await self._send(message)


def translate(body: bytes, rules: ChatRules) -> bytes:
    """A request as vLLM takes it. Reads, and where allowed fetches, its images. Raises RequestError."""
    request = read_request(read_json(body), rules)
    messages: list[dict[str, Any]] = []
    pixels = rules.limits.request_pixels
    for number, message in enumerate(request.messages):
        parts: list[dict[str, Any]] = []
        for place, part in enumerate(message.content):
            if isinstance(part, ImagePart):
                name = f"messages[{number}].content[{place}].image_url"
                content, taken = _read_image(part.address, name, rules, pixels)
                pixels -= taken
                data = f"data:image/unknown;base64,{base64.b64encode(content).decode()}"
                parts.append({"type": "image_url", "image_url": {"url": data}})
            elif not isinstance(part, str):
                parts.append({"type": "text", "text": part.text})
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": message.content if isinstance(message.content, str) else parts})
    return json.dumps(_fields(request) | {"messages": messages}).encode()


def _fields(request: ChatRequest) -> dict[str, Any]:
    fields = request.model_dump(include=SAMPLING, exclude_none=True)
    images = request.model_dump(include={"scale_factor", "max_image_tokens"}, exclude_none=True)
    if images:
        fields["mm_processor_kwargs"] = images
    if request.stream_options is not None:
        fields["stream_options"] = {"include_usage": bool(request.stream_options.include_usage)}
    return fields


def _read_image(address: str, name: str, rules: ChatRules, pixels_left: int) -> tuple[bytes, int]:
    """An image's file and its number of pixels. Raises RequestError."""
    try:
        content = read_address(address, rules.allowed_hosts, rules.limits)
        pixels = check_picture_file(content, rules.limits)
        if pixels > pixels_left:
            most = f"{rules.limits.request_pixels:,}"
            raise PictureError(f"the images have more than the {most} pixels allowed in a request; shrink them")
    except ValueError as error:  # a decoder's own words may repeat what is in the file
        message = str(error) if error.__cause__ is None else "the image cannot be decoded; save it anew"
        raise RequestError(message, name, code="invalid_image") from error
    return content, pixels


async def _answer(send: Send, status: int, content: dict[str, Any], retry_after_s: int | None = None) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 408:
        headers.append((b"connection", b"close"))  # the rest of the body is not waited for
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
