"""The HTTP application: chat completions, models, health and metrics, in OpenAI's forms.

A request is read, its images decoded and its prompt prepared in a few threads; the engine's pieces, the time limit and
the client's leaving then arrive in one inbox.
"""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokenpacker import __version__
from tokenpacker.serve.chat_requests import Completion, check_model, prepare, refusal
from tokenpacker.serve.http_bodies import check_host, check_key, read_body
from tokenpacker.serve.metrics import Metrics
from tokenpacker.serve.openai_schema import (
    ChatCompletion,
    ChatRequest,
    ErrorAnswer,
    ModelCard,
    ModelList,
    RequestError,
    read_json,
)
from tokenpacker.serve.questions import ClosedError, Engine, Piece, Prepared, Ticket
from tokenpacker.serve.server import ServeSettings

logger = logging.getLogger("tokenpacker.serve")

PREPARING_THREADS = 4  # each holds the decoded images of one request
LEFT = 499  # nginx's status of a request whose client left
OPEN = ("/health",)  # what needs no key
MAX_LOGGED = 80  # characters of a path
TOKENS = "tokenpacker.tokens"  # where a request's scope has its counts for the log
DESCRIPTIONS = {
    400: "A field, an image or a value that the model cannot take.",
    401: "The API key is missing or wrong.",
    404: "The model is not served here.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The body is not application/json.",
    421: "The request names a host that this server is not called by.",
    429: "Too many requests are waiting; Retry-After says when to try again.",
    500: "The server failed.",
    503: "The server is shutting down.",
    504: "The answer took too long.",
}


def build_app(engine: Engine, settings: ServeSettings) -> FastAPI:
    """The application; `app.state.service` is its `Service`."""
    service = Service(engine, settings)
    app = FastAPI(title="tokenpacker", version=__version__, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(_Outermost, service=service)
    app.add_exception_handler(HTTPException, _refuse_route)

    @app.post(
        "/v1/chat/completions",
        responses={
            200: {"model": ChatCompletion, "content": {"text/event-stream": {}}},
            **_errors(400, 401, 404, 408, 413, 415, 429, 500, 503, 504),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {"application/json": {"schema": {"$ref": "#/components/schemas/ChatRequest"}}},
            }
        },
    )
    async def chat_completions(request: Request) -> Response:
        return await service.chat(request)

    @app.get("/v1/models", response_model=ModelList, responses=_errors(401))
    async def models() -> Any:
        return {"object": "list", "data": [service.card]}

    @app.get("/v1/models/{name:path}", response_model=ModelCard, responses=_errors(401, 404))
    async def model(name: str) -> Any:
        check_model(name, settings.model)
        return service.card

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=_errors(503))
    async def health() -> dict[str, str]:
        service.check_open()
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **_errors(401)})
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    app.openapi = lambda: app.openapi_schema or _describe(app)  # type: ignore[method-assign]
    return app


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": ErrorAnswer, "description": DESCRIPTIONS[status]} for status in (*statuses, 421)}


def _describe(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. The body of a chat request is read by us, within limits, so FastAPI does not know it."""
    document = get_openapi(title=app.title, version=app.version, routes=app.routes)
    request = ChatRequest.model_json_schema(ref_template="#/components/schemas/{model}")
    request["properties"]["model"]["enum"] = [app.state.service.settings.model]
    schemas = document["components"]["schemas"]
    schemas |= request.pop("$defs") | {"ChatRequest": request}
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    needs_key = app.state.service.settings.api_key is not None
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            operation["security"] = [{"key": []}] if needs_key and path not in OPEN else []
    app.openapi_schema = document
    return document


def _error_response(error: RequestError) -> Response:
    headers = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if error.status == 408:
        headers["Connection"] = "close"  # the rest of the body is not waited for
    return JSONResponse(error.body(), error.status, headers)


async def _refuse_route(request: Request, error: Any) -> Response:
    """Routes and methods that do not exist."""
    message = {404: "there is no such route", 405: "the route does not have this method"}.get(error.status_code)
    refused = RequestError(message or "the request is not valid", status=error.status_code)
    return JSONResponse(refused.body(), refused.status, error.headers)


class _Outermost:
    """Checks host and key, turns what goes wrong into an answer, counts, and writes one line for each request."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 0

        async def note(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            self.service.check(scope)
            await self.app(scope, receive, note)
        except ClientDisconnect:
            pass
        except asyncio.CancelledError:  # by uvicorn, which would log the trace: the grace time ends
            if not self.service.draining:
                raise
            if not status:
                await _error_response(refusal(ClosedError()))(scope, receive, note)
        except Exception as error:
            refused = refusal(error)
            if not status:
                await _error_response(refused)(scope, receive, note)
        finally:
            self._note(scope, status or LEFT, time.monotonic() - start)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "-")
        prompt, images, answers = scope.get(TOKENS, (0, 0, 0))
        metrics = self.service.metrics
        metrics.requests.labels(route, status).inc()
        metrics.seconds.labels(route).observe(seconds)
        for kind, count in (("prompt", prompt), ("image", images), ("answer", answers)):
            metrics.tokens.labels(kind).inc(count)
        path = ascii(scope["path"][:MAX_LOGGED])[1:-1]  # a line break in it makes no line of its own
        counts = f", {prompt} tokens of prompt, {answers} of answer" if prompt else ""
        level = logging.DEBUG if route in OPEN and status == 200 else logging.INFO  # which is asked every few seconds
        logger.log(level, "%s %s %d, %.0f ms%s", scope["method"], path, status, 1000 * seconds, counts)


class Service:
    """What the routes share.

    Attributes:
        draining: whether new requests are refused.
        preparing: requests that are read and not yet in the engine's queue; only the event loop changes it.
    """

    def __init__(self, engine: Engine, settings: ServeSettings):
        self.engine, self.settings = engine, settings
        self.metrics = Metrics(engine)
        self.pool = ThreadPoolExecutor(PREPARING_THREADS, "tokenpacker-prepare", _compute_alone)
        self.card = {"id": settings.model, "object": "model", "created": int(time.time()), "owned_by": "tokenpacker"}
        self.draining = False
        self.preparing = 0

    def check(self, scope: Scope) -> None:
        """Raises RequestError for a request to another host, or without the key to a route that needs it."""
        check_host(scope, self.settings.names)
        if scope["path"] not in OPEN:
            check_key(scope, self.settings.api_key)

    def check_open(self) -> None:
        """Raises ClosedError while the server ends."""
        if self.draining:
            raise ClosedError

    async def chat(self, request: Request) -> Response:
        """Answers a request to `/v1/chat/completions`."""
        self.check_open()
        self.engine.check_room(self.preparing)  # before the work of preparing it
        exchange = _Exchange(self, request)
        try:
            response = await exchange.answer()
        except BaseException:
            exchange.close()
            raise
        if not isinstance(response, _AnswerStream):  # which closes the exchange itself
            exchange.close()
        return response

    def prepare(self, body: bytes) -> tuple[ChatRequest, Prepared]:
        """The request in a body, and its prompt with its images; for a thread of the pool."""
        return prepare(self.engine, read_json(body), self.settings)


def _compute_alone() -> None:
    """Has torch, if the engine uses it, compute with this thread alone: there are several, and the engine's own."""
    if "torch" in sys.modules:
        from tokenpacker.serve.embedded.model_threads import set_own_threads

        set_own_threads(1)


class _Exchange:
    """A chat request on its way. Its news: the prepared prompt, pieces, the time limit, and that the client left."""

    def __init__(self, service: Service, request: Request):
        self.service, self.request = service, request
        self.start = time.monotonic()
        self.limit_s = service.settings.limits.request_s
        self.loop = asyncio.get_running_loop()
        self.news: asyncio.Queue[Any] = asyncio.Queue()
        self.timer = self.loop.call_later(self.limit_s, self.news.put_nowait, TimeoutError())
        self.preparation: Future[Any] | None = None
        self.watch: asyncio.Task[None] | None = None
        self.ticket: Ticket | None = None
        self.completion: Completion | None = None

    async def answer(self) -> Response:
        """The response, once the first piece is there: an error before that has a status of its own."""
        await self._prepare()
        asked, prepared = await self._next()
        self.completion = Completion(asked.model, prepared.usage, asked.n or 1)
        self.ticket = self.service.engine.submit(prepared, self._put)
        piece = await self._next()
        self.service.metrics.first_token_seconds.observe(time.monotonic() - self.start)
        if asked.stream:
            include_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            return _AnswerStream(self, piece, include_usage)
        self.completion.add(piece)
        while not self.completion.done:
            self.completion.add(await self._next())
        return JSONResponse(self.completion.to_dict())

    def close(self) -> None:
        """Ends what still goes on for the request."""
        self.timer.cancel()
        if self.preparation is not None:
            self.preparation.cancel()  # if it has not begun
        if self.watch is not None:
            self.watch.cancel()
        if self.ticket is not None:
            self.ticket.cancel()
        if self.completion is not None:
            prompt = self.completion.prompt
            counts = (prompt.prompt_tokens, prompt.image_tokens, self.completion.completion_tokens)
            self.request.scope[TOKENS] = counts

    def _put(self, news: Piece | Exception) -> None:
        """The engine's listener."""
        with suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.news.put_nowait, news)

    async def _next(self) -> Any:
        news = await self.news.get()
        if isinstance(news, Exception):
            raise news
        return news

    async def _prepare(self) -> None:
        """Reads the body, and has a thread prepare it."""
        service = self.service
        service.preparing += 1
        try:
            body = await read_body(self.request.scope, self.request.receive, service.settings.limits)
        except BaseException:
            service.preparing -= 1
            raise

        def ended(future: asyncio.Future[Any]) -> None:
            service.preparing -= 1
            if not future.cancelled():
                self.news.put_nowait(future.exception() or future.result())

        self.preparation = service.pool.submit(service.prepare, body)
        asyncio.wrap_future(self.preparation).add_done_callback(ended)
        self.watch = self.loop.create_task(self._watch())

    async def _watch(self) -> None:
        """Waits for the client to leave."""
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.news.put_nowait(ClientDisconnect())

    async def events(self, piece: Piece, include_usage: bool) -> AsyncIterator[str]:
        """Server-sent events from the first piece on. An error ends them with an event of its own."""
        completion = self.completion
        assert completion is not None
        started: set[int] = set()
        try:
            while True:
                if piece.index not in started:
                    started.add(piece.index)
                    yield _event(completion.chunk(piece.index, {"role": "assistant", "content": ""}))
                completion.add(piece)
                if piece.text:
                    yield _event(completion.chunk(piece.index, {"content": piece.text}))
                if piece.finish_reason:
                    yield _event(completion.chunk(piece.index, {}, piece.finish_reason))
                if completion.done:
                    break
                piece = await self._next()
            if include_usage:
                yield _event(completion.usage_chunk())
        except ClientDisconnect:
            return
        except Exception as error:
            yield _event(refusal(error).body())
        yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


class _AnswerStream(StreamingResponse):
    """Streams an answer, and ends the exchange however the stream ends. A client that does not read is given up."""

    def __init__(self, exchange: _Exchange, piece: Piece, include_usage: bool):
        self.exchange = exchange
        events = exchange.events(piece, include_usage)
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left_s = self.exchange.start + self.exchange.limit_s + 1 - time.monotonic()  # +1: for the event that says so
        try:
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self.stream_response(send), max(left_s, 1))
        finally:
            self.exchange.close()
