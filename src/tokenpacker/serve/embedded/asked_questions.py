"""A question on its way through the embedded engine, and the answers to it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from threading import RLock

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tokenpacker.serve.embedded.answer_text import AnswerText
from tokenpacker.serve.embedded.prepared_prompts import Prompt
from tokenpacker.serve.embedded.row_sampling import RowSampler
from tokenpacker.serve.questions import Listener, Piece

logger = logging.getLogger(__name__)


class Asked:
    """A submitted question, and its ticket.

    Args:
        on_end: is called once the question needs nothing more.

    Attributes:
        rows: answers that have not begun.
        ended: whether all is said, by answers, an error or the asker.
    """

    def __init__(
        self,
        prompt: Prompt,
        tokenizer: PreTrainedTokenizerBase,
        listener: Listener,
        on_end: Callable[[Asked], None],
    ):
        self.prompt, self.ended = prompt, False
        self.rows = [Row(self, index, tokenizer) for index in range(prompt.sampling.n)]
        self._listener, self._on_end, self._left = listener, on_end, prompt.sampling.n
        self._lock = RLock()

    def tell(self, news: Piece | Exception) -> None:
        """Calls the listener, unless the question has ended. An error ends it."""
        with self._lock:
            if self.ended:
                return
            self._left -= isinstance(news, Piece) and news.finish_reason is not None
            self.ended = isinstance(news, Exception) or self._left == 0
            if self.ended:
                self._on_end(self)
            try:
                self._listener(news)
            except Exception as error:
                logger.warning("a listener failed with %s; its question ends", type(error).__name__)
                self.cancel()

    def cancel(self) -> None:
        """Ends the answers as soon as possible. The listener is not called any more, once this returns."""
        with self._lock:
            self.ended = True
        self._on_end(self)


class Row:
    """One answer to a question."""

    def __init__(self, asked: Asked, index: int, tokenizer: PreTrainedTokenizerBase):
        sampling = asked.prompt.sampling
        self.asked, self.index = asked, index
        self.sampler = RowSampler(sampling, index)
        self.text = AnswerText(tokenizer, sampling.stop)
        self.tokens: list[int] = []
        self.packed: list[Tensor] = []
        self.regions: list[Tensor] = []
        self.cached_tokens = 0
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
        return Piece(self.index, text, len(self.tokens), reason, self.cached_tokens)  # type: ignore[arg-type]
