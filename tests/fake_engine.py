"""An engine without a model, whose answers follow from the question, and a real server around any engine."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

from tokenpacker.serve.questions import (
    ClosedError,
    EngineCounts,
    Listener,
    Piece,
    Question,
    QueueFullError,
    Usage,
)


class FakeEngine:
    """Answers a question with its own words, a piece for each.

    The word WAIT waits until `released`, SLOW takes a second, and FAIL fails with a message that nobody may see.
    """

    def __init__(self, max_waiting: int = 64):
        self.max_waiting = max_waiting
        self.questions: list[Question] = []
        self.tickets: list[FakeTicket] = []
        self.released = threading.Event()
        self.closed = False

    def prepare(self, question: Question) -> FakePrompt:
        return FakePrompt(question)

    def submit(self, prepared: FakePrompt, listener: Listener) -> FakeTicket:
        if self.closed:
            raise ClosedError
        self.check_room()
        self.questions.append(prepared.question)
        ticket = FakeTicket(self, prepared.question, listener)
        self.tickets.append(ticket)
        threading.Thread(target=ticket.work, daemon=True).start()
        return ticket

    def check_room(self, coming: int = 0) -> None:
        if self.counts().running + coming >= self.max_waiting:
            raise QueueFullError(7)

    def counts(self) -> EngineCounts:
        return EngineCounts(running=sum(not ticket.ended.is_set() for ticket in self.tickets))

    def close(self, grace_s: float) -> None:
        self.closed = True
        for ticket in self.tickets:
            if not ticket.ended.wait(grace_s):
                ticket.tell(ClosedError())
                ticket.ended.set()


class FakePrompt:
    def __init__(self, question: Question):
        self.question = question
        self.words = " ".join(text_of(message) for message in question.messages).split()
        self.usage = Usage(len(self.words) + 10 * len(question.images), 10 * len(question.images))


class FakeTicket:
    def __init__(self, engine: FakeEngine, question: Question, listener: Listener):
        self.engine, self.question, self.listener = engine, question, listener
        self.ended, self.cancelled = threading.Event(), False
        self.lock = threading.RLock()

    def cancel(self) -> None:
        with self.lock:
            self.cancelled = not self.ended.is_set()
            self.ended.set()

    def tell(self, news: Piece | Exception) -> None:
        with self.lock:
            if not self.ended.is_set():
                self.listener(news)

    def work(self) -> None:
        sampling = self.question.sampling
        words = text_of(self.question.messages[-1]).split()[: sampling.max_tokens]
        for index in range(sampling.n):
            for number, word in enumerate(words, start=1):
                if word == "WAIT":
                    while not (self.engine.released.wait(0.01) or self.ended.is_set()):
                        pass
                if word == "SLOW":
                    time.sleep(1)
                if word == "FAIL":
                    self.tell(RuntimeError("the secret of the prompt"))
                    return self.ended.set()
                is_end = word in sampling.stop
                text = "" if is_end else word if number == 1 else f" {word}"
                self.tell(Piece(index, text, number, "stop" if is_end or number == len(words) else None))
                if is_end:
                    break
            if not words:
                self.tell(Piece(index, "", 1, "stop"))
        return self.ended.set()


def text_of(message: dict[str, Any]) -> str:
    return " ".join(part.get("text", "") for part in message["content"])


@contextmanager
def serving(engine: Any, **settings: Any) -> Iterator[str]:
    """A server on a free port in a thread; gives its address."""
    import asyncio

    import uvicorn

    from tokenpacker.serve.http_app import build_app
    from tokenpacker.serve.server import ServeSettings

    app = build_app(engine, ServeSettings(**{"model": "tiny", **settings}))
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1)
    )
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    while not server.started:
        thread.join(0.01)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def data_url(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """A picture as a client sends it."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return f"data:image/{format.lower()};base64," + base64.b64encode(file.getvalue()).decode()


def question(text: str = "say one two three", *addresses: str, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    parts = [{"type": "image_url", "image_url": {"url": address}} for address in addresses]
    messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
    return {"model": "tiny", "messages": messages, **fields}
