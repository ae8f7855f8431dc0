"""What stands before vLLM's routes, so that both engines have the same API: fields, limits, addresses, key, errors.

A request is read by the rules of the embedded engine. It goes on to vLLM with every image as data, and with
`scale_factor` and `max_image_tokens` where vLLM wants them. Plain `vllm serve FOLDER` has all that vLLM has.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any

from starlette.requests import ClientDisconnect
from transformers import AutoProcessor

from tokenpacker.hf import TokenPackerProcessor
from tokenpacker.serve.chat_requests import ChatRules, check_model, field_of, invalid, read_request, refusal, role_of
from tokenpacker.serve.embedded.prepared_prompts import fill_template
from tokenpacker.serve.http_bodies import Message, Receive, check_host, check_key, read_body
from tokenpacker.serve.openai_schema import ChatRequest, ImagePart, RequestError, read_json
from tokenpacker.serve.picture_sources import PictureError, check_picture_file, read_address
from tokenpacker.serve.questions import QueueFullError
from tokenpacker.serve.refusals import Refusals
from tokenpacker.serve.vllm_server import FOLDER, settings_from_environment

Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

RUNNING = 256  # requests that vLLM may run at once; as many as `Limits.waiting` wait beside them
CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
SAMPLING = {"model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "n", "stream"}


# vLLM lists dozens of routes at its start. Most of them are closed here.
logging.getLogger("vllm.entrypoints.launchers.launcher").addFilter(
    lambda record: not str(record.msg).startswith(("Available routes", "Route: "))
)


class VLLMFrontDoor:
    """ASGI middleware for vLLM's `--middleware`."""

    def __init__(self, app: App):
        self.app, self.settings = app, settings_from_environment()
        self.processor = _load_processor(os.environ[FOLDER])
        self.in_flight, self.refusals = 0, Refusals()
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
        check_host(scope, self.settings.names)
        if path != HEALTH:
            check_key(scope, self.settings.api_key)
        if path == HEALTH and method == "HEAD":
            scope, method = {**scope, "method": "GET"}, "GET"  # the server leaves the body out
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
            raise refusal(QueueFullError(self.refusals.retry_after_s(self.in_flight - RUNNING, RUNNING)))
        self.in_flight += 1
        self.refusals.wait(max(0, self.in_flight - RUNNING))
        try:
            await asyncio.wait_for(self._pass_on(scope, receive, answer.send), limits.request_s)
        except asyncio.TimeoutError:
            if not answer.started:
                rule = "the answer took longer than allowed; ask for fewer tokens"
                raise RequestError(rule, status=504, code="timeout") from None
        finally:
            self.in_flight -= 1
            self.refusals.end()
            self.refusals.wait(max(0, self.in_flight - RUNNING))
        if answer.failed:
            raise _failed()

    async def _pass_on(self, scope: Message, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, self.settings.limits)
        body = await asyncio.to_thread(translate, body, self.settings, self.processor)
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replay() -> Message:
            return next(messages, None) or await receive()

        headers = [(name, value) for name, value in scope["headers"] if name not in (b"content-length",)]
        headers.append((b"content-length", str(len(body)).encode()))
        await self.app({**scope, "headers": headers}, replay, send)


class _Answer:
    """Passes vLLM's answer on in the form of the embedded engine; a failure of the server is kept back.

    Counts of image tokens get our name too, an answer loses the space before it, and an error names its field.
    """

    def __init__(self, send: Send):
        self._send = send
        self.started = self.failed = self._is_stream = False
        self._begun: set[int] = set()  # answers of which text was sent
        self._rest = b""

    async def send(self, message: Message) -> None:
        """An ASGI `send`."""
        if message["type"] == "http.response.start":
            headers = [(name.lower(), value) for name, value in message["headers"]]
            kinds = [value for name, value in headers if name == b"content-type"]
            self.failed, self._is_stream = message["status"] >= 500, kinds[:1] != [b"application/json"]
            message = {**message, "headers": [pair for pair in headers if pair[0] != b"content-length"]}
        elif message["type"] == "http.response.body":
            message = {**message, "body": self._changed(message.get("body", b""), message.get("more_body", False))}
        if not self.failed:
            self.started = True
            await self._send(message)

    def _changed(self, body: bytes, more: bool) -> bytes:
        """What can be sent of the body up to now: whole events of a stream, or all of it at its end."""
        *whole, self._rest = (self._rest + body).split(b"\n\n") if self._is_stream else [self._rest + body]
        if not more and self._rest:
            whole, self._rest = [*whole, self._rest], b""
        return (b"\n\n" if self._is_stream else b"").join([*map(self._change, whole), b""])

    def _change(self, text: bytes) -> bytes:
        start = b"data: " if text.startswith(b"data: ") else b""
        try:
            content = json.loads(text.removeprefix(start))
        except ValueError:  # [DONE], a comment, metrics
            return text
        details = (content.get("usage") or {}).get("prompt_tokens_details") or {}
        if (counts := details.get("multimodal_tokens")) and "image" in counts:
            details["image_tokens"] = counts["image"]
        for choice in content.get("choices", ()):
            said = choice.get("delta") or choice.get("message") or {}
            if said.get("content") and choice["index"] not in self._begun:
                said["content"] = said["content"].lstrip()
                self._begun |= {choice["index"]} if said["content"] else set()
        if isinstance(error := content.get("error"), dict):
            if start and error.get("code") != 400:  # in a stream; its words may repeat the request
                return start + json.dumps(_failed().body()).encode()
            error["param"] = error.get("param") or field_of(error.get("message") or "")
        return start + json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _failed() -> RequestError:
    return RequestError("the server failed on this request", status=500, code="internal_error")


def translate(body: bytes, rules: ChatRules, processor: TokenPackerProcessor) -> bytes:
    """A request as vLLM takes it. Reads, and where allowed fetches, its images. Raises RequestError."""
    request = read_request(read_json(body), rules)
    messages: list[dict[str, Any]] = []
    check_texts(processor, request)
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
        messages.append(
            {"role": role_of(message), "content": message.content if isinstance(message.content, str) else parts}
        )
    return json.dumps(_fields(request) | {"messages": messages}).encode()


def check_texts(processor: TokenPackerProcessor, request: ChatRequest) -> None:
    """Raises RequestError for texts that the embedded engine refuses: those that write the model's own tokens."""
    messages = []
    for message in request.messages:
        parts = message.content if isinstance(message.content, list) else [message.content]
        shown = [part if isinstance(part, str) else getattr(part, "text", None) for part in parts]
        content = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in shown]
        messages.append({"role": role_of(message), "content": content})
    try:
        fill_template(processor, messages)
    except ValueError as error:
        raise invalid(error) from error


@lru_cache(maxsize=1)
def _load_processor(folder: str) -> TokenPackerProcessor:
    return AutoProcessor.from_pretrained(folder)


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
