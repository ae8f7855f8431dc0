"""The results file: one JSON object a line, each written whole, which a comparison goes on from.

Rows of several machines may be put together in any order. The last row of a fingerprint counts.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
RUN, SPEED = "run", "speed"  # kinds of rows

Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
    """All rows in the file's order; none where there is no file. A last line that was cut off is left out.

    Raises: ValueError for a line that is no row, with its number.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline was not finished
        if line.strip():
            rows.append(_parse(path, number, line))
    return rows


def append_row(path: Path, row: Row) -> None:
    """Adds a row and waits until the disk has it; what an earlier process left half written goes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def latest(rows: list[Row], kind: str) -> dict[str, Row]:
    """Of each fingerprint the last row of this kind, in the order in which these rows were written."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == kind:
            found.pop(row["fingerprint"], None)
            found[row["fingerprint"]] = row
    return found


def of_one_protocol(rows: list[Row]) -> list[Row]:
    """The rows that may stand in one table: those with the settings of the last run in the file."""
    protocols = [row["protocol"] for row in rows if row["kind"] == RUN]
    return [row for row in rows if row["protocol"] == protocols[-1]] if protocols else []


def _parse(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"kind", "protocol", "fingerprint"} <= set(row):
        raise ValueError(f"{path}, line {number} is no row of a comparison; delete the line")
    return row
