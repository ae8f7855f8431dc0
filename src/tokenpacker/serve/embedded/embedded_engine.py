"""The engine for one process and one model: a laptop, a test, a small server.

Callers tile images and tokenize in their own threads. One thread owns the model. It encodes the tiles that are new,
lets waiting answers join the running ones, and makes a token for each of them at every step.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from threading import Condition, RLock, Thread
from typing import Any

import torch
from torch import Tensor

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.serve.embedded.answer_text import AnswerText
from tokenpacker.serve.embedded.packed_cache import PackedCache
from tokenpacker.serve.embedded.prepared_prompts import Prompt, prepare_prompt
from tokenpacker.serve.embedded.row_sampling import RowSampler, choose_tokens
from tokenpacker.serve.embedded.running_batch import RunningBatch
from tokenpacker.serve.questions import (
    ClosedError,
    EngineCounts,
    Listener,
    Piece,
    Prepared,
    Question,
    QueueFullError,
    Ticket,
)

logger = logging.getLogger(__name__)

RECENT = 64  # questions that the rate is taken from
LONGEST_WAIT_S = 120  # that a client is told
SIMILAR = 0.75  # prompts are padded together if the shortest has at least this share of the longest


class EmbeddedEngine:
    """Answers questions with a model in this process; see `questions.Engine`.

    Args:
        model: is used by the engine's thread alone from now on.
        max_batch_size: most answers that are generated together.
        max_waiting: most questions in the queue.
        max_new_tokens: most tokens of an answer, and the default.
        batch_tokens: most tokens of the key/value cache, padding included; also a limit for prompt and answer.
        cache_bytes: memory for packed tokens of images that were seen before; 0 keeps none.

    Attributes:
        cache: with its hits, misses and bytes.
        tokens_generated: by all answers so far.
        batch_sizes: how often each number of answers was generated together.

    Raises:
        ValueError: for limits below 1.
    """

    def __init__(
        self,
        model: TokenPackerForConditionalGeneration,
        processor: TokenPackerProcessor,
        *,
        max_batch_size: int = 16,
        max_waiting: int = 64,
        max_new_tokens: int = 512,
        batch_tokens: int = 32_768,
        cache_bytes: int = 256 * 2**20,
    ):
        limits = {"max_batch_size": max_batch_size, "max_waiting": max_waiting, "max_new_tokens": max_new_tokens}
        for name, value in (limits | {"batch_tokens": batch_tokens}).items():
            if value < 1:
                raise ValueError(f"{name}={value} is too small; use at least 1")
        self.model, self.processor = model.eval(), processor
        self.max_batch_size, self.max_waiting, self.max_new_tokens = max_batch_size, max_waiting, max_new_tokens
        self.batch_tokens = batch_tokens
        positions = getattr(model.config.text_config, "max_position_embeddings", None)
        self.max_length = min(batch_tokens, positions or batch_tokens)
        self.cache = PackedCache(cache_bytes)
        self.tokens_generated = 0
        self.batch_sizes: Counter[int] = Counter()
        ends = model.generation_config.eos_token_id
        self._end_tokens = set(ends if isinstance(ends, list) else [ends]) - {None}
        self._changed = Condition()
        self._waiting: deque[_Asked] = deque()
        self._open: set[_Asked] = set()
        self._alone: deque[_Row] = deque()  # after an error in a batch, each of its rows is tried again alone
        self._rows: list[_Row] = []
        self._batch = RunningBatch(model)
        self._ended_at: deque[float] = deque(maxlen=RECENT)
        self._closed = False
        self._thread = Thread(target=self._run, name="tokenpacker-engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Questions in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Questions that are being answered."""
        return len(self._open) - len(self._waiting)

    def counts(self) -> EngineCounts:
        """Waiting and running questions, and uses of the cache, where an image counts by its tiles."""
        return EngineCounts(self.waiting, self.running, self.cache.hits, self.cache.misses)

    def prepare(self, question: Question) -> Prompt:
        """Tiles the images and counts the prompt's tokens, on the caller's thread.

        `max_tokens` is lowered to what the engine and the model have room for.

        Raises:
            ValueError: for images, options and lengths that the model cannot take.
        """
        return prepare_prompt(self.processor, question, max_length=self.max_length, max_tokens=self.max_new_tokens)

    def submit(self, prepared: Prepared, listener: Listener) -> Ticket:
        """Puts a question into the queue.

        Raises:
            QueueFullError: if too many wait.
            ClosedError: once `close` was called.
        """
        assert isinstance(prepared, Prompt)
        asked = _Asked(self, prepared, listener)
        with self._changed:
            if self._closed:
                raise ClosedError("the engine is closed and takes no more questions")
            if len(self._waiting) >= self.max_waiting:
                raise QueueFullError(self._retry_after_s())
            self._waiting.append(asked)
            self._open.add(asked)
            self._changed.notify()
        return asked

    def close(self, grace_s: float) -> None:
        """Takes no more questions, answers those that were accepted, and ends those that take longer than `grace_s`."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(grace_s)
        with self._changed:
            late = list(self._open)
        for asked in late:
            asked.tell(ClosedError("the engine was closed before the answer was complete"))
        self._thread.join()

    def _retry_after_s(self) -> int:
        """Seconds until those that wait now will have been answered, at the recent rate."""
        if not self._ended_at:
            return 1
        rate = len(self._ended_at) / max(time.monotonic() - self._ended_at[0], 1e-3)
        return max(1, min(math.ceil(len(self._waiting) / rate), LONGEST_WAIT_S))

    def _forget(self, asked: _Asked) -> None:
        with self._changed:
            if asked in self._open:
                self._open.remove(asked)
                self._ended_at.append(time.monotonic())
            if asked in self._waiting:
                self._waiting.remove(asked)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._rows or self._alone or self._waiting or self._closed)
                rows = self._admit()
                if self._closed and not (rows or self._rows or self._alone or self._waiting):
                    return
            try:
                with torch.inference_mode():
                    self._start(rows)
                    self._step()
            except Exception as error:  # a bug of ours must not end the thread
                logger.error("the engine failed with %s", type(error).__name__)
                logger.debug("its traceback", exc_info=True)
                for asked in {row.asked for row in (*rows, *self._rows, *self._alone)}:
                    asked.tell(error)
                self._drop_batch()

    def _admit(self) -> list[_Row]:
        """Takes the rows out of the queue for which there is room."""
        self._alone = deque(row for row in self._alone if not row.asked.ended)
        if self._alone or any(row.alone for row in self._rows):
            return [] if self._rows else [self._alone.popleft()]
        taken: list[_Row] = []
        while self._waiting:
            asked = self._waiting[0]
            together = [*self._rows, *taken, *asked.rows[:1]]
            longest = max(len(row.asked.prompt.ids) + row.asked.prompt.max_tokens for row in together)
            if len(together) > self.max_batch_size or len(together) * longest > self.batch_tokens:
                break
            taken.append(asked.rows.pop(0))
            if not asked.rows:
                self._waiting.popleft()
        return taken

    def _start(self, rows: list[_Row]) -> None:
        """Encodes the images of new rows and lets them join the batch."""
        self._isolate(self._encode, rows)
        new = sorted((row for row in rows if not row.asked.ended), key=lambda row: len(row.ids))
        while new:
            group = [row for row in new if len(new[0].ids) >= SIMILAR * len(row.ids)]
            new = new[len(group) :]
            self._isolate(self._join, group)

    def _isolate(self, work: Callable[[Sequence[_Row]], None], rows: Sequence[_Row]) -> None:
        """Does work on rows together, and after an error on each alone. Only those that fail alone end with it."""
        if not rows:
            return
        try:
            work(rows)
            return
        except Exception as error:
            if len(rows) == 1:
                rows[0].asked.tell(error)
                return
            logger.warning("%d prompts failed together with %s; trying each", len(rows), type(error).__name__)
        for row in rows:
            self._isolate(work, [row])

    def _encode(self, rows: Sequence[_Row]) -> None:
        prompts = [row.asked.prompt for row in rows]
        tiles = {
            key: tile
            for prompt in prompts
            if prompt.tiles is not None
            for key, tile in zip(prompt.keys, prompt.tiles, strict=True)
        }
        packed = self.cache.pack(self.model, tiles)
        for row, prompt in zip(rows, prompts, strict=True):
            row.packed = [packed[key] for key in prompt.keys]

    def _join(self, rows: Sequence[_Row]) -> None:
        logits = self._batch.join([row.ids for row in rows], [tokens for row in rows for tokens in row.packed])
        for row in rows:
            row.packed = []
        self._rows += rows
        self._push(rows, logits)

    def _step(self) -> None:
        for number in reversed(range(len(self._rows))):
            if self._rows[number].ended:
                self._batch.drop(number)
                self._rows[number] = self._rows[-1]
                self._rows.pop()
        if not self._rows:
            return
        self.batch_sizes[len(self._rows)] += 1
        try:
            logits = self._batch.step([row.tokens[-1] for row in self._rows])
        except Exception as error:
            self._retry(error)
        else:
            self._push(self._rows, logits)

    def _retry(self, error: Exception) -> None:
        """After an error in a step the cache cannot be used any more. Each row starts anew, with its tokens so far."""
        rows = self._rows
        self._drop_batch()
        if len(rows) == 1:
            rows[0].asked.tell(error)
            return
        logger.warning("%d answers failed together with %s; trying each", len(rows), type(error).__name__)
        for row in rows:
            row.alone = True
        self._alone.extend(rows)

    def _drop_batch(self) -> None:
        self._rows = []
        self._batch.clear()

    def _push(self, rows: Sequence[_Row], logits: Tensor) -> None:
        """Gives each row its next token."""
        tokens = choose_tokens(logits, [row.sampler for row in rows])
        for row, token in zip(rows, tokens, strict=True):
            if row.ended:
                continue
            if token is None:
                row.asked.tell(ArithmeticError("the model gave numbers that are not finite; no token can be chosen"))
                continue
            self.tokens_generated += 1
            piece = row.push(token, self._end_tokens)
            if piece.text or piece.finish_reason:
                row.asked.tell(piece)


class _Asked:
    """A question on its way, and its ticket."""

    def __init__(self, engine: EmbeddedEngine, prompt: Prompt, listener: Listener):
        self.prompt, self.ended = prompt, False
        self.rows = [_Row(self, index, engine.processor.tokenizer) for index in range(prompt.sampling.n)]
        self._engine, self._listener, self._left = engine, listener, prompt.sampling.n
        self._lock = RLock()

    def tell(self, news: Piece | Exception) -> None:
        """Calls the listener, unless the question has ended. An error ends it."""
        with self._lock:
            if self.ended:
                return
            self._left -= isinstance(news, Piece) and news.finish_reason is not None
            self.ended = isinstance(news, Exception) or self._left == 0
            try:
                self._listener(news)
            except Exception as error:
                logger.warning("a listener failed with %s; its question ends", type(error).__name__)
                self.ended = True
            ended = self.ended
        if ended:
            self._engine._forget(self)

    def cancel(self) -> None:
        """Ends the answers as soon as possible. The listener is not called any more, once this returns."""
        with self._lock:
            self.ended = True
        self._engine._forget(self)


class _Row:
    """One answer to a question."""

    def __init__(self, asked: _Asked, index: int, tokenizer: Any):
        sampling = asked.prompt.sampling
        self.asked, self.index = asked, index
        self.sampler = RowSampler(sampling, index)
        self.text = AnswerText(tokenizer, sampling.stop)
        self.tokens: list[int] = []
        self.packed: list[Tensor] = []
        self.finished = self.alone = False

    @property
    def ids(self) -> list[int]:
        """The prompt, and the answer so far."""
        return self.asked.prompt.ids + self.tokens

    @property
    def ended(self) -> bool:
        """Whether the row needs no more tokens."""
        return self.finished or self.asked.ended

    def push(self, token: int, end_tokens: set[int]) -> Piece:
        """Appends a token and returns the text that is new."""
        self.tokens.append(token)
        is_end, is_last = token in end_tokens, len(self.tokens) >= self.asked.prompt.max_tokens
        text = "" if is_end else self.text.push(token)
        if (is_end or is_last) and not self.text.stopped:
            text += self.text.finish()
        self.finished = is_end or is_last or self.text.stopped
        reason = None if not self.finished else "stop" if is_end or self.text.stopped else "length"
        return Piece(self.index, text, len(self.tokens), reason)  # type: ignore[arg-type]
