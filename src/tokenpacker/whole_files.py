"""Files that a kill leaves whole: one process writes at a time, whole lines or whole files."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

GO_ON = "the rows written so far are kept, and the same command goes on"
SYNC_SECONDS = 5.0  # between two calls of fsync; only a power cut can lose rows that were written later


@contextlib.contextmanager
def locked(file: Path, taken: str, *, seconds: float = 0, keep: bool = False) -> Iterator[None]:
    """Holds the lock that a file stands for. The system releases that of a process that dies.

    Args:
        file: is made, and removed at the end.
        taken: message of the error.
        seconds: how long to wait for another process.
        keep: leaves the file where it is.

    Raises:
        ValueError: if another process holds the lock.
    """
    lock = FileLock(file, timeout=seconds)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(taken) from None
    try:
        yield
    finally:
        if not keep:
            with contextlib.suppress(OSError):  # Windows keeps a file that is open
                file.unlink(missing_ok=True)
        lock.release()


@contextlib.contextmanager
def only_writer(path: Path) -> Iterator[None]:
    """Keeps other processes from writing the same output.

    Raises:
        ValueError: if another process writes it, or it cannot be written.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{path} cannot be written: there is no folder {path.parent}; create it first")
    if path.exists() and not (path.is_file() and os.access(path, os.W_OK)):
        raise ValueError(f"{path} is not a file that can be written; choose another output")
    written = path.resolve()  # of which there is one, however many links lead to it
    taken = f"another process is writing {path}; wait for its end, or choose another output"
    with locked(written.parent / f".{written.name}.lock", taken):
        yield


def write_whole(path: Path, text: str) -> None:
    """Writes a file in UTF-8 so that a kill leaves the old one or the new one. Half characters become escapes."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8", errors="backslashreplace")
    part.replace(path)


class WholeLines:
    """A file, open for more lines. A context manager.

    Args:
        end: where the kept lines end, in bytes; anything behind it is cut off.

    Raises:
        OSError: if the disk is full; the message says how to go on.
    """

    def __init__(self, path: Path, end: int):
        self.path, self.end = path, end

    def __enter__(self) -> WholeLines:
        """Opens the file."""
        with self._saying_how_to_go_on():
            # without a buffer: a line is in the system's hands when `append` returns, and outlives a kill
            self.file = open(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", 0)
            self.file.truncate(self.end)
            self.file.seek(self.end)
            self.synced = time.monotonic()
        return self

    def append(self, lines: bytes) -> None:
        """Writes a line or several."""
        rest = memoryview(lines)
        with self._saying_how_to_go_on():
            while rest:
                rest = rest[self.file.write(rest) :]
            if time.monotonic() - self.synced >= SYNC_SECONDS:
                os.fsync(self.file.fileno())
                self.synced = time.monotonic()

    def __exit__(self, *error: object) -> None:
        """Closes the file; all lines are on the disk."""
        with self._saying_how_to_go_on(), self.file:
            os.fsync(self.file.fileno())

    @contextlib.contextmanager
    def _saying_how_to_go_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            said = f"{error.strerror}; {GO_ON}"
            raise OSError(error.errno, said, str(self.path)) from None
