"""The output file: proof that its rows belong to this run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokenpacker.batch.batch_rows import Row


def check_kept(path: Path, rows: Iterator[Row], on_row: Callable[[dict[str, Any]], None]) -> int:
    """Goes through the rows that an earlier run has written, and takes as many from `rows`.

    Args:
        on_row: gets each kept output row.

    Returns:
        Where they end, in bytes. What follows is a row that a killed run did not write to its end.

    Raises:
        ValueError: if a row is not the answer to the same line with the same settings.
    """
    end = 0
    if not path.exists():
        return end
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            output = _output(line)
            row = next(rows, None)
            if output is None or row is None or output["id"] != row.id:
                raise ValueError(
                    f"{path} {_difference(number, output, row)}; add --overwrite to start anew, or choose"
                    " another output"
                )
            on_row(output)
            end += len(line)
    return end


def output_rows(path: Path, end: int) -> Iterator[dict[str, Any]]:
    """The rows of an output that was checked, up to `end` bytes."""
    with path.open("rb") as file:
        while file.tell() < end:
            yield json.loads(file.readline())


def _output(line: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(content, dict) and isinstance(content.get("id"), str)
    return content if whole and content["id"].startswith("batch_req_") else None


def _difference(number: int, output: dict[str, Any] | None, row: Row | None) -> str:
    if output is None:
        return f"is not the output of a batch: line {number} has no id of one"
    if row is None:
        return f"has more rows than the input: line {number} answers none"
    settings = [row_id.rpartition("_")[0] for row_id in (output["id"], row.id)]
    if settings[0] != settings[1]:
        return "was written with another model or other options; repeat those"
    return f"was written for another input: its row {number} does not answer line {row.place.number}"
