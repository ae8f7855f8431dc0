"""What a text must be before it goes to a tokenizer."""

from __future__ import annotations

import re
from typing import Any

LONE_SURROGATE = re.compile("[\ud800-\udfff]")  # Python's strings may hold halves of UTF-16 pairs; UTF-8 has none


def check_text(text: Any, name: str = "the text") -> str:
    """The text itself.

    Args:
        name: opens the messages of errors.

    Raises:
        ValueError: for what is no string, and for a string that no tokenizer takes since it is no Unicode text.
    """
    if not isinstance(text, str):
        raise ValueError(f"{name} is given as {type(text).__name__}; pass a string")
    if broken := LONE_SURROGATE.search(text):
        raise ValueError(
            f"{name} has U+{ord(broken[0]):04X} at character {broken.start() + 1}, which is half a character (a lone"
            " surrogate, as of bytes that are not UTF-8); write it in UTF-8, or take it out"
        )
    return text
