"""Tokens to text, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

INCOMPLETE = "\ufffd"  # what a decoder writes for bytes that are no character, or not yet


class AnswerText:
    """The text of an answer while its tokens come.

    All pieces together are the decoded answer without leading spaces, up to the first text of `stop`. A piece ends
    between two characters, and holds nothing that may be the beginning of a stop text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.stopped = False
        self._tokenizer, self._stop = tokenizer, [text for text in stop if text]
        self._ids: list[int] = []
        # A token's text depends on the one before: LLaMA's decoder drops a space at the beginning. So the ids from
        # `_context` on are decoded, and the text of those before `_read` is taken away.
        self._context = self._read = 0
        self._started = False
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain now. It may be empty. `stopped` tells whether it is the last."""
        self._ids.append(token)
        return self._release(self._decode(final=False))

    def finish(self) -> str:
        """The text that was held back until now, at the end of an answer that did not stop."""
        text = self._release(self._decode(final=True))
        return text if self.stopped else text + self._held

    def _decode(self, final: bool) -> str:
        known, text = (
            self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            for ids in (self._ids[self._context : self._read], self._ids[self._context :])
        )
        if len(text) <= len(known) or (text.endswith(INCOMPLETE) and not final):
            return ""
        self._context, self._read = self._read, len(self._ids)
        text = text[len(known) :]
        if not self._started:  # the prompt ends in "ASSISTANT:", the answer begins with a space
            text = text.lstrip()
            self._started = bool(text)
        return text

    def _release(self, text: str) -> str:
        held = self._held + text
        found = [place for place in map(held.find, self._stop) if place >= 0]
        self.stopped = bool(found)
        end = min(found) if found else len(held) - max((_overlap(held, stop) for stop in self._stop), default=0)
        self._held = held[end:]
        return held[:end]


def _overlap(text: str, stop: str) -> int:
    """The number of characters at the end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
