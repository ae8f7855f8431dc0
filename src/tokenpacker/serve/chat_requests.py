"""A request's JSON to a question for an engine, and the pieces of its answers to JSON.

body -> `read_request` -> ChatRequest -> `read_question` -> Question -> engine -> Piece ... -> `Completion` -> JSON
"""

from __future__ import annotations

import asyncio
import logging
import queue
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from tokenpacker.serve.limits import Limits
from tokenpacker.serve.openai_schema import ChatRequest, ImagePart, Message, RequestError, check_request
from tokenpacker.serve.picture_sources import PictureError, read_pictures
from tokenpacker.serve.questions import (
    ClosedError,
    Engine,
    FinishReason,
    Piece,
    Prepared,
    Question,
    QueueFullError,
    Sampling,
    Usage,
)

CLOSED_RETRY_S = 30  # by then a server that ends was replaced, or never will be
logger = logging.getLogger("tokenpacker.serve")


@dataclass(frozen=True, kw_only=True)
class ChatRules:
    """What requests may ask of a server.

    Args:
        model: the one name of a model that is answered; None answers all.
        allowed_hosts: hosts that images may be fetched from.
        scale_factor: for requests that name none, like `max_image_tokens`.
    """

    model: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    scale_factor: int | Literal["auto"] | None = None
    max_image_tokens: int | None = None
    limits: Limits = field(default_factory=Limits)


def read_request(body: Any, rules: ChatRules) -> ChatRequest:
    """The request in a body. Raises RequestError for a wrong field, an unknown model, and beyond the limits."""
    if rules.model is not None and isinstance(body, dict) and "model" not in body:
        raise RequestError(f"model is missing; use {rules.model!r}", "model", code="missing_required_parameter")
    request, limits = check_request(body), rules.limits
    check_model(request.model, rules.model)
    parts = [part for message in request.messages for part in _parts(message)]
    texts = [part for part in parts if isinstance(part, str)]
    for name, value, most in (
        ("messages", len(request.messages), limits.messages),
        ("characters of text in messages", sum(map(len, texts)), limits.characters),
        ("images in messages", len(parts) - len(texts), limits.images),
        ("n", request.n or 1, limits.answers),
        ("texts in stop", len(request.stop) if isinstance(request.stop, list) else 0, limits.stops),
        ("max_tokens", request.max_tokens or request.max_completion_tokens or 1, limits.max_tokens),
    ):
        if value > most:
            rule = f"{name} must be at most {most}" if name in ChatRequest.model_fields else f"at most {most} {name}"
            raise RequestError(f"{rule}, not {value}", name.split()[-1], code="limit_exceeded")
    return request


def check_model(name: str, served: str | None) -> None:
    """Raises RequestError if another model is asked for than is served."""
    if served is not None and name != served:
        raise RequestError(
            f"this model is not served here; use {served!r}", "model", status=404, code="model_not_found"
        )


def read_question(request: ChatRequest, rules: ChatRules) -> Question:
    """The question of a request. Reads, and where allowed fetches, its images. Raises RequestError."""
    places, addresses, messages = [], [], []
    for number, message in enumerate(request.messages):
        parts = []
        for place, part in enumerate(_parts(message)):
            if isinstance(part, ImagePart):
                places.append(f"messages[{number}].content[{place}].image_url")
                addresses.append(part.address)
                parts.append({"type": "image"})
            else:
                parts.append({"type": "text", "text": part})
        messages.append({"role": role_of(message), "content": parts})
    try:
        images = read_pictures(addresses, rules.allowed_hosts, rules.limits)
    except PictureError as error:
        raise RequestError(str(error), places[error.number or 0], code="invalid_image") from error
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    return Question(
        messages=tuple(messages),
        images=images,
        scale_factor=request.scale_factor or rules.scale_factor,
        max_image_tokens=request.max_image_tokens or rules.max_image_tokens,
        sampling=Sampling(
            max_tokens=request.max_tokens or request.max_completion_tokens,
            temperature=1.0 if request.temperature is None else request.temperature,
            top_p=request.top_p or 1.0,
            seed=request.seed,
            stop=tuple(stop),
            n=request.n or 1,
        ),
    )


def role_of(message: Message) -> str:
    """The role that chat templates know: `developer` is the newer name of `system`."""
    return "system" if message.role == "developer" else message.role


def _parts(message: Message) -> Iterator[str | ImagePart]:
    content = message.content
    for part in [content] if isinstance(content, str) else content:
        yield part if isinstance(part, (str, ImagePart)) else part.text


class Completion:
    """The answers to a request, put together from their pieces."""

    def __init__(self, model: str, usage: Usage, num_answers: int):
        self.prompt = usage
        self._about = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._texts = [""] * num_answers
        self._tokens = [0] * num_answers
        self._reasons: list[FinishReason | None] = [None] * num_answers
        self._cached_tokens = 0

    @property
    def done(self) -> bool:
        """Whether all answers have ended."""
        return all(self._reasons)

    @property
    def completion_tokens(self) -> int:
        """Generated so far, by all answers together."""
        return sum(self._tokens)

    def add(self, piece: Piece) -> None:
        """Appends a piece to its answer."""
        self._texts[piece.index] += piece.text
        self._tokens[piece.index] = piece.num_tokens
        self._reasons[piece.index] = piece.finish_reason
        if piece.index == 0:  # later answers find the images of the first one in the cache
            self._cached_tokens = piece.cached_tokens

    def usage(self) -> dict[str, Any]:
        """Tokens of the prompt, and of all answers together."""
        return {
            "prompt_tokens": self.prompt.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {
                "image_tokens": self.prompt.image_tokens,
                "cached_tokens": self._cached_tokens,
            },
        }

    def to_dict(self) -> dict[str, Any]:
        """The answer to a request without `stream`."""
        choices = [
            {
                "index": index,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "finish_reason": reason,
                "logprobs": None,
            }
            for index, (text, reason) in enumerate(zip(self._texts, self._reasons, strict=True))
        ]
        return {**self._about, "object": "chat.completion", "choices": choices, "usage": self.usage()}

    def chunk(self, index: int, delta: dict[str, str], finish_reason: FinishReason | None = None) -> dict[str, Any]:
        """A part of a stream."""
        choice = {"index": index, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
        return {**self._about, "object": "chat.completion.chunk", "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last part of a stream that is to end with its usage."""
        return {**self._about, "object": "chat.completion.chunk", "choices": [], "usage": self.usage()}


def prepare(engine: Engine, body: Any, rules: ChatRules) -> tuple[ChatRequest, Prepared]:
    """The request in a body, and its prompt with its images, ready for `engine.submit`. Raises RequestError."""
    request = read_request(body, rules)
    question = read_question(request, rules)
    try:
        return request, engine.prepare(question)
    except ValueError as error:
        if _place(error).startswith("tokenpacker."):
            raise invalid(error) from error
        raise


def invalid(error: ValueError) -> RequestError:
    """What a client is told of a value that the model cannot take."""
    return RequestError(str(error), field_of(str(error)), code="invalid_value")


def field_of(message: str) -> str | None:
    """The field of a request that a message begins with, as in `scale_factor=99 exceeds ...`."""
    field = message.partition("=")[0]
    return field if field in ChatRequest.model_fields else None


def refusal(error: Exception) -> RequestError:
    """What a client is told of an error. A message of a library may repeat a prompt, and stays here."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, QueueFullError):
        return RequestError(str(error), status=429, code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, ClosedError):
        return RequestError(
            "the server is shutting down; try again", status=503, code="shutting_down", retry_after_s=CLOSED_RETRY_S
        )
    if isinstance(error, (TimeoutError, asyncio.TimeoutError, queue.Empty)):
        return RequestError("the answer took longer than allowed; ask for fewer tokens", status=504, code="timeout")
    logger.error("a request failed with %s in %s", type(error).__name__, _place(error))
    logger.debug("its traceback", exc_info=error)
    return RequestError("the server failed on this request", status=500, code="internal_error")


def _place(error: Exception) -> str:
    """Module and line that raised an error."""
    trace, place = error.__traceback__, "an unknown place"
    while trace is not None:
        place = f"{trace.tb_frame.f_globals.get('__name__')}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def answer(engine: Engine, body: Any, rules: ChatRules) -> tuple[int, dict[str, Any]]:
    """Answers a request in the calling thread: HTTP's status, and the answer or error as JSON.

    For work without HTTP, such as batches; `stream` must be off.
    """
    ticket = None
    try:
        deadline = time.monotonic() + rules.limits.request_s
        request, prepared = prepare(engine, body, rules)
        if request.stream:
            raise RequestError("stream must be false here, where an answer comes in one piece", "stream")
        news: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
        ticket = engine.submit(prepared, news.put)
        completion = Completion(request.model, prepared.usage, request.n or 1)
        while not completion.done:
            piece = news.get(timeout=max(0.0, deadline - time.monotonic()))
            if isinstance(piece, Exception):
                raise piece
            completion.add(piece)
        return 200, completion.to_dict()
    except Exception as error:
        refused = refusal(error)
        return refused.status, refused.body()
    finally:
        if ticket is not None:
            ticket.cancel()
