"""Shapes that annotations of the tests have, and what is said in a row."""

from __future__ import annotations

SQUARE = [[2.0, 2.0, 20.0, 2.0, 20.0, 20.0, 2.0, 20.0]]
TRIANGLE = [[30, 5, 40, 5, 35, 25]]


def texts(row):
    """Questions and answers of a row, the image's mark and line taken off."""
    values = [message["value"] for message in row["conversations"]]
    assert values[0].startswith("<image>\n")
    values[0] = values[0].removeprefix("<image>\n")
    return list(zip(values[::2], values[1::2], strict=True))
