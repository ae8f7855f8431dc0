"""What an engine is asked and what it answers. Without torch: a server checks requests before it touches a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from PIL import Image

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is chosen, in the terms and with the defaults of OpenAI's API.

    Args:
        max_tokens: longest answer; None takes the engine's limit.
        temperature: 0 takes the most likely token always.
        top_p: share of the probability that tokens are drawn from.
        seed: makes drawn answers repeatable; None draws anew each time.
        stop: texts that end an answer and do not belong to it.
        n: number of answers.

    Raises:
        ValueError: for a number outside of its range.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1

    def __post_init__(self) -> None:
        for name, least, most in (("max_tokens", 1, inf), ("temperature", 0, inf), ("top_p", 0, 1), ("n", 1, inf)):
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                remedy = f"use {least} or more" if most == inf else f"use {least} to {most}"
                raise ValueError(f"{name}={value} is out of range; {remedy}")


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation that is to be continued.

    Args:
        messages: for `processor.apply_chat_template`, with `{"type": "image"}` where an image belongs.
        images: RGB pictures in the order of those parts.
        regions: what each `<mask>` in the texts stands for: the index of its image, and a region as the processor takes
            it. Engines that know no regions refuse them.
        scale_factor: for every image; "auto" for each tile by its detail, None for the model's own.
        max_image_tokens: limit per image, separators included; None sets no limit.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[Image.Image, ...] = ()
    regions: tuple[tuple[int, Any], ...] = ()
    scale_factor: int | Literal["auto"] | None = None
    max_image_tokens: int | None = None
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Usage:
    """Tokens of a prompt; `image_tokens` of them belong to images, separators included."""

    prompt_tokens: int
    image_tokens: int


@dataclass(frozen=True)
class Piece:
    """A part of answer number `index`. The last piece of an answer has a reason to finish.

    Args:
        num_tokens: generated tokens of the answer so far, the end token included.
        cached_tokens: tokens of the prompt that were in a cache; of the embedded engine packed tokens of images.
    """

    index: int
    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0


@dataclass(frozen=True)
class EngineCounts:
    """What an engine does now, and how often its cache had an image since the start."""

    waiting: int = 0
    running: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


Listener = Callable[["Piece | Exception"], None]
"""Gets the pieces of all answers, or the error that ended them. It is called on the engine's thread and must not
block."""


class Prepared(Protocol):
    """A question whose prompt and images are ready for the model."""

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt."""


class Ticket(Protocol):
    """A submitted question."""

    def cancel(self) -> None:
        """Ends the answers as soon as possible. The listener is not called any more, once this returns."""


class QueueFullError(Exception):
    """Too many questions are waiting."""

    def __init__(self, retry_after_s: int):
        super().__init__(f"the server is busy; try again in {retry_after_s} seconds")
        self.retry_after_s = retry_after_s


class ClosedError(Exception):
    """The engine takes no more questions."""


class Engine(Protocol):
    """Answers questions. All methods may be called from any thread."""

    def prepare(self, question: Question) -> Prepared:
        """Tiles the images and counts the prompt's tokens, on the caller's thread.

        Raises:
            ValueError: for images, options and lengths that the model cannot take.
        """

    def submit(self, prepared: Prepared, listener: Listener) -> Ticket:
        """Puts a question into the queue.

        Raises:
            QueueFullError: if too many wait.
            ClosedError: once `close` was called.
        """

    def check_room(self, coming: int = 0) -> None:
        """Raises QueueFullError if the queue has no room beside `coming` questions that are being prepared."""

    def counts(self) -> EngineCounts:
        """Waiting and running questions, and uses of the cache."""

    def close(self, grace_s: float) -> None:
        """Takes no more questions, answers those that were accepted, and ends those that take longer than `grace_s`."""
