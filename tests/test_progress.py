"""How far long work is, with and without a terminal."""

from __future__ import annotations

import io
import sys

import pytest

from tokenpacker import progress
from tokenpacker.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """Seconds that tests set."""
    now = {"seconds": 0.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: now["seconds"])
    return now


def lines(capsys) -> list[str]:
    return capsys.readouterr().err.splitlines()


def test_without_a_terminal_a_line_comes_after_five_seconds_and_then_every_half_minute(capsys, clock):
    with Progress("easy-vqa", 1200) as shown:
        for second in range(100):
            clock["seconds"] = second
            shown.update(10 * second)
        clock["seconds"] = 120
        shown.update(1200)
    assert lines(capsys) == [
        "easy-vqa: 50 of 1,200 (0:00:05 so far, 0:01:55 left)",
        "easy-vqa: 350 of 1,200 (0:00:35 so far, 0:01:25 left)",
        "easy-vqa: 650 of 1,200 (0:01:05 so far, 0:00:55 left)",
        "easy-vqa: 950 of 1,200 (0:01:35 so far, 0:00:25 left)",
        "easy-vqa: 1,200 of 1,200 (0:02:00 so far)",
    ]


def test_short_work_says_nothing(capsys, clock):
    with Progress("reading", 10) as shown:
        shown.update(10)
    assert lines(capsys) == []


def test_a_line_ends_with_the_note(capsys, clock):
    shown = Progress("align-7b", 20, done=10).start()
    clock["seconds"] = 10
    shown.update(12, "loss 1.234")
    shown.stop()
    assert lines(capsys) == ["align-7b: 12 of 20 (0:00:10 so far, 0:00:40 left); loss 1.234"]


def test_what_has_no_total_is_only_counted_and_bytes_are_written_as_such(capsys, clock):
    with Progress("SRC [a] to DST", written=lambda count: f"{count / 1e9:.1f} GB") as shown:
        clock["seconds"] = 5
        shown.update(1_500_000_000)
        clock["seconds"] = 40
        shown.update(2_000_000_000, total=4_000_000_000)
    assert lines(capsys) == [
        "SRC [a] to DST: 1.5 GB (0:00:05 so far)",
        "SRC [a] to DST: 2.0 GB of 4.0 GB (0:00:40 so far, 0:00:40 left)",
    ]


def test_nothing_is_shown_unless_wanted(capsys, clock):
    with Progress("reading", 10, shown=False) as shown:
        clock["seconds"] = 10
        shown.update(5)
    assert lines(capsys) == []


def test_a_terminal_gets_a_bar_in_whatever_encoding(monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    terminal = Terminal(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with Progress("SRC [a] to DST", 10) as shown:
        shown.update(10, "loss 0.5")
    terminal.flush()
    written = terminal.buffer.getvalue().decode("cp1252")
    assert "SRC [a] to DST" in written
    assert "10 of 10  loss 0.5" in written
