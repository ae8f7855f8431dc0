"""The engine for one process and one model: a laptop, a test, a small server.

Callers tile images and tokenize in their own threads. One thread owns the model. It encodes the tiles that are new,
lets waiting answers join the running ones, and makes a token for each of them at every step.
"""

from __future__ import annotations

import atexit
import logging
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from threading import Condition, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.serve.embedded.asked_questions import Asked, Row
from tokenpacker.serve.embedded.model_threads import ModelThreads
from tokenpacker.serve.embedded.packed_cache import PackedCache
from tokenpacker.serve.embedded.prepared_prompts import Prompt, prepare_prompt
from tokenpacker.serve.embedded.row_sampling import choose_tokens
from tokenpacker.serve.embedded.running_batch import Prefilled, RunningBatch
from tokenpacker.serve.questions import (
    ClosedError,
    EngineCounts,
    Listener,
    Prepared,
    Question,
    QueueFullError,
    Ticket,
)
from tokenpacker.serve.refusals import Refusals

logger = logging.getLogger(__name__)

LAST_STEP_S = 5  # that a step of the model may still take when all questions have ended
# Short prompts are computed together, longer ones keep a processor busy alone (measured at 52 to 1,300 tokens).
SIMILAR = 0.75  # the shortest of them has at least this share of the longest
TOGETHER_TOKENS = 1024


NOT_APPLIED = (
    *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias", "num_beams", "penalty_alpha"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale"),
    *("min_length", "min_new_tokens", "exponential_decay_length_penalty", "stop_strings"),
)
"""Settings of a generation config that change greedy answers. Those about drawing are the question's."""


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
        _check_settings(model.generation_config)
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
        self._waiting: deque[Asked] = deque()
        self._open: set[Asked] = set()
        self._alone: deque[Row] = deque()  # after an error in a batch, each of its rows is tried again alone
        self._rows: list[Row] = []
        self._batch = RunningBatch(model)
        self._refusals = Refusals()
        self._closed = False
        self._num_threads = torch.get_num_threads()
        self._thread = Thread(target=self._run, name="tokenpacker-engine", daemon=True)
        self._thread.start()
        atexit.register(self.close, 0)  # Python may not end while the thread is in the model

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

    def check_room(self, coming: int = 0) -> None:
        """Raises QueueFullError if the queue has no room beside `coming` questions that are being prepared."""
        with self._changed:
            waiting = len(self._waiting) + coming
            if waiting >= self.max_waiting:
                raise QueueFullError(self._refusals.retry_after_s(waiting, self.running))

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
        asked = Asked(prepared, self.processor.tokenizer, listener, self._forget)
        with self._changed:
            if self._closed:
                raise ClosedError("the engine is closed and takes no more questions")
            self.check_room()
            self._waiting.append(asked)
            self._open.add(asked)
            self._refusals.wait(len(self._waiting))
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
        self._thread.join(LAST_STEP_S)
        atexit.unregister(self.close)

    def _forget(self, asked: Asked) -> None:
        with self._changed:
            if asked in self._open:
                self._open.remove(asked)
                self._refusals.end()
            if asked in self._waiting:
                self._waiting.remove(asked)
                self._refusals.wait(len(self._waiting))
            self._changed.notify()

    def _run(self) -> None:
        self._threads = ModelThreads(self.model, self._num_threads)
        while self._turn():
            pass
        self._threads.close()

    def _turn(self) -> bool:
        """Lets rows join and makes a token for each row. Returns False at the end, after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._rows or self._alone or self._waiting or self._closed)
            rows = self._admit()
            if not (rows or self._rows or self._alone or self._waiting):
                return not self._closed
        try:
            with torch.inference_mode():
                self._start(rows)
                self._step()
        except Exception as error:  # a mistake of the engine must not end its thread
            logger.error("the engine failed with %s", type(error).__name__)
            logger.debug("its traceback", exc_info=True)
            for asked in {row.asked for row in (*rows, *self._rows, *self._alone)}:
                asked.tell(error)
            self._drop_batch()
        return True

    def _admit(self) -> list[Row]:
        """Takes the rows out of the queue for which there is room."""
        self._alone = deque(row for row in self._alone if not row.asked.ended)
        if self._alone or any(row.alone for row in self._rows):
            return [] if self._rows else [self._alone.popleft()]
        taken: list[Row] = []
        while self._waiting:
            asked = self._waiting[0]
            together = [*self._rows, *taken, *asked.rows[:1]]
            longest = max(len(row.asked.prompt.ids) + row.asked.prompt.max_tokens for row in together)
            if len(together) > self.max_batch_size or len(together) * longest > self.batch_tokens:
                break
            taken.append(asked.rows.pop(0))
            if not asked.rows:
                self._waiting.popleft()
        self._refusals.wait(len(self._waiting))
        return taken

    def _start(self, rows: list[Row]) -> None:
        """Encodes the images of new rows and lets them join the batch."""
        encoded = [row for group, _ in self._isolate(self._encode, rows) for row in group]
        groups = _groups(encoded, self._threads.count)
        for group, ready in zip(groups, self._threads.map(self._try_prefill, groups), strict=True):
            for joined, logits in self._isolate(partial(self._join, group, ready), group):
                self._push(joined, logits)

    def _isolate(self, work: Callable[[list[Row]], Any], rows: list[Row]) -> Iterator[tuple[list[Row], Any]]:
        """Yields rows and what `work` makes of them: of all together, or after an error of each alone.

        Rows that fail alone are told the error.
        """
        rows = [row for row in rows if not row.ended]
        if not rows:
            return
        try:
            made = work(rows)
        except Exception as error:
            if len(rows) == 1:
                rows[0].asked.tell(error)
                return
            logger.warning("%d prompts failed together with %s; trying each", len(rows), type(error).__name__)
        else:
            yield rows, made
            return
        for row in rows:  # outside of the handler, where the error would keep memory of the model in use
            yield from self._isolate(work, [row])

    def _encode(self, rows: list[Row]) -> None:
        prompts = [row.asked.prompt for row in rows]
        tiles = {
            key: tile
            for prompt in prompts
            if prompt.tiles is not None
            for key, tile in zip(prompt.keys, prompt.tiles, strict=True)
        }
        known = {key for key in tiles if key in self.cache}
        packed = self.cache.pack(self.model, tiles, self._threads)
        for row, prompt in zip(rows, prompts, strict=True):
            row.packed = [packed[key] for key in prompt.keys]
            row.cached_tokens = sum(len(packed[key]) for key in prompt.keys if key in known)
            if prompt.regions:  # their tokens need the features of tiles, which the cache does not keep
                given = {name: value.to(self.model.device) for name, value in prompt.regions.items()}
                assert prompt.tiles is not None
                features = self.model.get_image_features(prompt.tiles.to(self.model.device), **given, return_dict=True)
                row.regions = [features.region_tokens]

    def _prefill(self, rows: list[Row]) -> Prefilled:
        packed, regions = ([tokens for row in rows for tokens in getattr(row, name)] for name in ("packed", "regions"))
        return self._batch.prefill([row.ids for row in rows], packed, regions)

    def _try_prefill(self, rows: list[Row]) -> Prefilled | None:
        """None after an error, which `_join` meets again."""
        try:
            return self._prefill(rows)
        except Exception:
            return None

    def _join(self, group: list[Row], ready: Prefilled | None, rows: list[Row]) -> Tensor:
        """Adds rows to the batch. `ready` is what was computed of their whole group."""
        if ready is None or len(rows) < len(group):
            ready = self._prefill(rows)
        self._batch.add(ready)
        for row in rows:
            row.packed, row.regions = [], []
        self._rows += rows
        return ready.logits

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

    def _push(self, rows: Sequence[Row], logits: Tensor) -> None:
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


def _check_settings(config: GenerationConfig) -> None:
    """Warns of settings for which answers would differ from those of `generate`."""
    set_here = [name for name in NOT_APPLIED if getattr(config, name, None) not in (None, False, 0, 1, [])]
    if set_here:
        warnings.warn(
            f"the model's generation config sets {', '.join(set_here)}, which the embedded engine does not apply; take"
            " it out to be sure, or serve the model with vLLM",
            stacklevel=3,
        )


def _groups(rows: list[Row], num_threads: int) -> list[list[Row]]:
    """Rows whose prompts are computed together, most work first. With enough rows there is a group for each thread."""
    rows = sorted(rows, key=lambda row: len(row.ids))
    most = TOGETHER_TOKENS
    if len(rows) >= num_threads:
        most = min(most, sum(len(row.ids) for row in rows) // num_threads)
    groups: list[list[Row]] = []
    for row in rows:
        length, group = len(row.ids), groups[-1] if groups else []
        if group and len(group[0].ids) >= SIMILAR * length and (len(group) + 1) * length <= most:
            group.append(row)
        else:
            groups.append([row])
    return sorted(groups, key=lambda group: -len(group) * len(group[-1].ids))  # so threads end at about the same time
