"""A question to an engine, and its answer as it grows."""

from __future__ import annotations

import queue
import time
import traceback
from collections.abc import Callable, Generator
from contextlib import suppress
from dataclasses import dataclass

from tokenpacker.serve.chat_requests import refusal
from tokenpacker.serve.questions import Engine, Piece, Prepared, Usage

POLL_S = 0.2  # between two looks whether the reader is still there and does not want to stop


@dataclass
class Growing:
    """An answer so far.

    Args:
        waited_ms: from the question until now, or to the first token, preparation of images included.
    """

    usage: Usage
    text: str = ""
    num_tokens: int = 0
    cached_tokens: int = 0
    waited_ms: float = 0.0

    def summary(self) -> str:
        """What the answer cost, for the line below it."""
        first = f"{'first token after' if self.num_tokens else 'waiting for'} {self.waited_ms:,.0f} ms"
        cached = f", {self.cached_tokens:,} image tokens from the cache" if self.cached_tokens else ""
        return f"{self.usage.prompt_tokens:,} tokens in the prompt; {first}{cached}; {self.num_tokens} in the answer"


def stream(
    engine: Engine, prepare: Callable[[], Prepared], timeout_s: float, stopped: Callable[[], bool]
) -> Generator[Growing]:
    """Yields the answer whenever it has grown, and some times a second. Leaving the iterator ends the answer.

    Args:
        prepare: makes the question; its errors are raised.

    Raises:
        QueueFullError, ClosedError: as `Engine.submit`.
        TimeoutError: after `timeout_s` seconds.
    """
    start = time.monotonic()
    prepared = prepare()
    growing = Growing(prepared.usage)
    news: queue.SimpleQueue[Piece | Exception] = queue.SimpleQueue()
    ticket = engine.submit(prepared, news.put)
    try:
        yield growing
        while not stopped():
            if time.monotonic() > start + timeout_s:
                raise TimeoutError
            piece = None
            with suppress(queue.Empty):
                piece = news.get(timeout=POLL_S)
            if not growing.num_tokens:
                growing.waited_ms = 1000 * (time.monotonic() - start)
            if piece is None:
                yield growing
                continue
            if isinstance(piece, Exception):
                raise piece
            growing.text += piece.text if growing.text else piece.text.lstrip()
            growing.num_tokens, growing.cached_tokens = piece.num_tokens, piece.cached_tokens
            yield growing
            if piece.finish_reason:
                return
    finally:
        ticket.cancel()


def sentence(error: Exception) -> str:
    """What a reader is told of an error. A message of a library stays here, since it may name files."""
    frames = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    ours = isinstance(error, ValueError) and frames[-1:] and frames[-1].startswith("tokenpacker.")
    text = str(error if ours else refusal(error))
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")
