"""Numbers and tables as text, for reports that people read."""

from __future__ import annotations

from collections.abc import Sequence

MEBI, TERA = 2**20, 10**12
UNKNOWN = "-"
SHORTEST_RULE = 3  # of a column, for readers of Markdown


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table whose columns line up as plain text too; all but text columns stand to the right.

    A column is of text when a cell of it begins with a letter.
    """
    columns = list(zip(header, *rows, strict=True))
    widths = [max(SHORTEST_RULE, *map(len, column)) for column in columns]
    of_text = [any(cell[:1].isalpha() for cell in column[1:]) for column in columns]
    rule = [_rule(width, left) for width, left in zip(widths, of_text, strict=True)]
    padded = []
    for row in (header, *rows):
        cells = zip(row, widths, of_text, strict=True)
        padded.append([cell.ljust(width) if left else cell.rjust(width) for cell, width, left in cells])
    return [f"| {' | '.join(cells)} |" for cells in (padded[0], rule, *padded[1:])]


def _rule(width: int, left: bool) -> str:
    return f":{'-' * (width - 1)}" if left else f"{'-' * (width - 1)}:"


def number(value: int | None) -> str:
    """A whole number with its thousands apart."""
    return UNKNOWN if value is None else f"{value:,}"


def tera(operations: int) -> str:
    """Operations in units of 10^12, three digits or all before the point."""
    return _three_digits(operations / TERA)


def mebi(num_bytes: int | None) -> str:
    """Bytes in MiB, three digits or all before the point."""
    return UNKNOWN if num_bytes is None else _three_digits(num_bytes / MEBI)


def milliseconds(value: float | None) -> str:
    """Milliseconds, three digits or all before the point."""
    return UNKNOWN if value is None else _three_digits(value)


def size_text(size: tuple[int, int]) -> str:
    """(height, width) as people write it."""
    return f"{size[0]} x {size[1]}"


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"
