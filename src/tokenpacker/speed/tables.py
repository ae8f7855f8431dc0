"""Numbers and Markdown tables for reports."""

from __future__ import annotations

from collections.abc import Sequence

MEBI, TERA = 2**20, 10**12
UNKNOWN = "-"
SHORTEST_RULE = 3  # dashes that Markdown readers need in a column


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose columns line up as plain text.

    A column with a cell that begins with a letter is aligned to the left, all others to the right. rich's tables with
    `box.MARKDOWN` have no colons for the alignment, and wrap at the width of the terminal.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(SHORTEST_RULE, *map(len, column)) for column in columns]
    is_text = [any(cell[:1].isalpha() for cell in column[1:]) for column in columns]
    padded = [
        [
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(row, widths, is_text, strict=True)
        ]
        for row in (header, *rows)
    ]
    rule = [
        f":{'-' * (width - 1)}" if left else f"{'-' * (width - 1)}:"
        for width, left in zip(widths, is_text, strict=True)
    ]
    return [f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:])]


def number(value: int | None) -> str:
    """A whole number with thousands separators."""
    return UNKNOWN if value is None else f"{value:,}"


def tera(operations: int) -> str:
    """Operations in units of 10^12, with three digits."""
    return milliseconds(operations / TERA)


def mebi(num_bytes: int | None) -> str:
    """Bytes in MiB, with three digits."""
    return UNKNOWN if num_bytes is None else milliseconds(num_bytes / MEBI)


def milliseconds(value: float | None) -> str:
    """Milliseconds with three digits, or with all digits before the point."""
    if value is None:
        return UNKNOWN
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def times(ratio: float) -> str:
    """A ratio, such as a speed-up."""
    return f"{ratio:.2f} x"


def size_text(size: Sequence[int]) -> str:
    """(height, width) as people write it."""
    return f"{size[0]} x {size[1]}"
