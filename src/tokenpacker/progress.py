"""Progress of long work on standard error: a bar on a terminal, plain lines in a file, a pipe or a scheduler's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 30.0  # without a terminal; shorter work writes no line


class Progress:
    """A context manager that shows progress; callbacks use `start` and `stop`.

    The bar is rich's. Without a terminal, rich shows nothing before the end, and tqdm, which transformers uses, writes
    one ever longer line with carriage returns; so the plain lines are written here.

    Args:
        total: the final count; None if unknown.
        done: the count at the start, which the estimate of the time left leaves out.
        written: formats a count.
        shown: False shows nothing.
    """

    def __init__(
        self,
        title: str,
        total: int | None = None,
        *,
        done: int = 0,
        written: Callable[[int], str] = "{:,}".format,
        shown: bool = True,
    ):
        self.title, self.total, self.done, self.note = title, total, done, ""
        self.begun_with, self.written, self.shown = done, written, shown
        self.bar: Any = None

    def start(self) -> Progress:
        """Starts the clock, and shows the bar on a terminal."""
        self.started = time.monotonic()
        self.next_line = self.started + FIRST_LINE_SECONDS
        self.last_line: int | None = None  # the count in it
        if self.shown and sys.stderr.isatty():
            self.bar = _bar()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, count="")
            self.bar.start()
        return self

    def stop(self) -> None:
        """Ends the bar; without a terminal, writes a last line if there were any before."""
        if self.bar is not None:
            self.bar.stop()
        elif self.last_line is not None and self.last_line != self.done:
            self._write_line()

    def __enter__(self) -> Progress:
        """Starts."""
        return self.start()

    def __exit__(self, *error: object) -> None:
        """Stops."""
        self.stop()

    def update(self, done: int, note: str | None = None, *, total: int | None = None) -> None:
        """Shows that `done` are done; without a terminal, writes a line every half minute.

        Args:
            note: stands after the count from now on, such as the last loss.
            total: replaces the final count.
        """
        self.done = done
        self.note = self.note if note is None else note
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, count=f"{self._count()}  {self.note}")
        elif self.shown and time.monotonic() >= self.next_line:
            self._write_line()

    def _count(self) -> str:
        return self.written(self.done) + ("" if self.total is None else f" of {self.written(self.total)}")

    def _write_line(self) -> None:
        now = time.monotonic()
        self.next_line, self.last_line = now + LINE_SECONDS, self.done
        times = f"{_clock(now - self.started)} so far"
        if self.total is not None and self.begun_with < self.done < self.total:
            pace = (now - self.started) / (self.done - self.begun_with)
            times += f", {_clock(pace * (self.total - self.done))} left"
        note = f"; {self.note}" if self.note else ""
        print(f"{self.title}: {self._count()} ({times}){note}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _bar() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    title, count = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[count]"))
    columns = (title, BarColumn(), count, TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
