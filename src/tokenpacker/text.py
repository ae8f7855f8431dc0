"""Checks of text, and suggestions for misspelt names. Without torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # a Python string may hold half of a UTF-16 pair; UTF-8 has none


def check_text(text: Any, name: str = "the text") -> str:
    """Returns the text if a tokenizer can take it.

    Args:
        name: the first words of the error message.

    Raises:
        ValueError: if `text` is no string, or if it holds half a character (a lone surrogate).
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is given as {type(text).__name__}; pass a string")
    if broken := LONE_SURROGATE.search(text):
        raise ValueError(
            f"{name} has U+{ord(broken[0]):04X} at character {broken.start() + 1}, which is half a character (a lone"
            " surrogate, as of a text cut within an emoji or bytes that are not UTF-8); write it anew in UTF-8"
        )
    return text


def did_you_mean(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """Returns `; did you mean X?`, the end of an error message, or "" if no word is close.

    Args:
        words: the valid ones.
        cutoff: similarity, 0 to 1, from which a word counts as close; as in `difflib.get_close_matches`.
    """
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else ""
