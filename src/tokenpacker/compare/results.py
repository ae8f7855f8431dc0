"""The results file: one JSON object per line, from which a comparison resumes.

Rows of several machines may be concatenated in any order. The last row of a fingerprint counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

RESULTS = "results.jsonl"
RUN, SPEED = "run", "speed"  # kinds of rows

Row = dict[str, Any]


def digest_of(content: Any) -> str:
    """A short digest of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def read_rows(path: Path) -> list[Row]:
    """All rows in the file's order, none if there is no file; an incomplete last line is left out.

    Raises ValueError with the number of a line that is no row.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]  # the text after the last newline is incomplete
    return [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def append_row(path: Path, row: Row) -> None:
    """Adds a row and waits until the disk has it; replaces a line that an earlier process left incomplete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        file.seek(0)
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)
        file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def latest(rows: list[Row], kind: str) -> dict[str, Row]:
    """The last row of this kind by fingerprint, in the order in which these rows were written."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["kind"] == kind:
            found.pop(row["fingerprint"], None)
            found[row["fingerprint"]] = row
    return found


def of_one_protocol(rows: list[Row]) -> list[Row]:
    """The rows that belong in one table: those with the protocol of the last run in the file."""
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
