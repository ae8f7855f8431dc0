"""How far long work is, on standard error: a bar on a terminal, plain lines in a file, a pipe or a scheduler's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

FIRST_LINE_SECONDS, LINE_SECONDS = 5.0, 30.0  # without a terminal; work that ends before the first says nothing


class Progress:
    """A bar, or plain lines; a context manager, and `start` and `stop` for callbacks.

    Args:
        total: of what is counted; None where nobody knows.
        done: how much was done before, which the estimate of the time left must not count.
        written: how a count is shown.
        shown: False is silent.
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
        """Shows the bar, or takes the time."""
        self.started = time.monotonic()
        self.next_line = self.started + FIRST_LINE_SECONDS
        self.told: int | None = None  # the count of the last line
        if self.shown and sys.stderr.isatty():
            self.bar = _bar()
            self.task = self.bar.add_task(self.title, total=self.total, completed=self.done, told="")
            self.bar.start()
        return self

    def stop(self) -> None:
        """Leaves the bar as it is; where lines were written, the last one says how it ended."""
        if self.bar is not None:
            self.bar.stop()
        elif self.told is not None and self.told != self.done:
            self._line()

    def __enter__(self) -> Progress:
        """As `start`."""
        return self.start()

    def __exit__(self, *error: object) -> None:
        """As `stop`."""
        self.stop()

    def update(self, done: int, note: str | None = None, *, total: int | None = None, now: bool = False) -> None:
        """Shows that so many are done.

        Args:
            note: stands behind the count from now on, such as the last loss.
            total: a new one.
            now: writes a line at once where there is no terminal; else one is written every half minute.
        """
        self.done = done
        self.note = self.note if note is None else note
        self.total = self.total if total is None else total
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=self.total, told=f"{self._count()}  {self.note}")
        elif self.shown and (now or time.monotonic() >= self.next_line):
            self._line()

    def _count(self) -> str:
        return self.written(self.done) + ("" if self.total is None else f" of {self.written(self.total)}")

    def _line(self) -> None:
        now = time.monotonic()
        self.next_line, self.told = now + LINE_SECONDS, self.done
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

    title, told = (TextColumn(f"{{task.{name}}}", markup=False) for name in ("description", "fields[told]"))
    columns = (title, BarColumn(), told, TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True))
