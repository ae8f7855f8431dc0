"""The output file: whole rows only, one process at a time, and proof that it belongs to this run."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from tokenpacker.batch.batch_rows import GO_ON, Row, to_line

SYNC_SECONDS = 5.0  # between two calls of fsync; only a power cut can lose rows that were written later


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keeps other processes from writing the same output. The system releases the lock of a process that dies.

    Raises:
        ValueError: if another process writes it, or it cannot be written.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; create it first")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not a file that can be written; choose another output")
    written = path.resolve()  # of which there is one, however many links lead to it
    lock = FileLock(written.parent / f".{written.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(f"another process is writing {path}; wait for its end, or choose another output") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows keeps a file that is open
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


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


class OutputRows:
    """The output, open for more rows. A context manager.

    Args:
        end: where the kept rows end; anything behind it is cut off.

    Raises:
        OSError: if the disk is full; the message says how to go on.
    """

    def __init__(self, path: Path, end: int):
        self.path, self.end = path, end

    def __enter__(self) -> OutputRows:
        """Opens the file."""
        with self._saying_how_to_go_on():
            # without a buffer: a row is in the system's hands when `append` returns, and outlives a kill
            self.file = open(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", 0)
            self.file.truncate(self.end)
            self.file.seek(self.end)
            self.synced = time.monotonic()
        return self

    def append(self, output: dict[str, Any]) -> None:
        """Writes a row."""
        rest = memoryview(to_line(output))
        with self._saying_how_to_go_on():
            while rest:
                rest = rest[self.file.write(rest) :]
            if time.monotonic() - self.synced >= SYNC_SECONDS:
                os.fsync(self.file.fileno())
                self.synced = time.monotonic()

    def __exit__(self, *error: object) -> None:
        """Closes the file; all rows are on the disk."""
        with self._saying_how_to_go_on(), self.file:
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _saying_how_to_go_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"{error.strerror}; {GO_ON}"
            raise OSError(error.errno, said, str(self.path)) from None
