"""Order, resuming, and what a run does to its output."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from batch_files import Files, echo, read, request, texts
from tokenpacker.batch import Reply, run_batch
from tokenpacker.batch.in_order import AHEAD, in_order
from tokenpacker.whole_files import only_writer

# A second try of failed rows, with an engine that takes a moment for each row.
RETRY = """
import sys, time
from pathlib import Path
from batch_files import Files, echo
def slow(body):
    time.sleep(0.02)
    with open(sys.argv[2], "a") as asked:
        asked.write(body["messages"][0]["content"] + "\\n")
    return echo(body)
Files(Path(sys.argv[1])).run(slow, concurrency=1, retry_failed=True)
"""
# A run with an engine that takes a moment for each row.
SLOW = """
import sys, time
from pathlib import Path
from batch_files import Files, echo
def slow(body):
    time.sleep(0.02)
    with open(sys.argv[2], "a") as asked:
        asked.write(body["messages"][0]["content"] + "\\n")
    return echo(body)
Files(Path(sys.argv[1])).run(slow, concurrency=4)
"""


def many(count: int) -> list[dict]:
    return [request(f"row-{number}", f"question {number}") for number in range(count)]


def test_rows_come_in_the_order_of_the_input(files):
    def unsteady(body):
        time.sleep(random.random() / 100)
        return echo(body)

    files.write(*many(60))
    _, rows = files.run(unsteady, concurrency=8)
    assert texts(rows) == [f"question {number}" for number in range(60)]


def test_few_items_are_held_at_a_time():
    begun = []
    results = in_order(lambda item: item, (begun.append(number) or number for number in range(100)), num_threads=2)
    assert next(results) == 0
    assert len(begun) == 2 * AHEAD
    assert list(results) == list(range(1, 100))


def test_an_error_of_the_work_ends_it_in_its_place():
    def work(item):
        if item == 5:
            raise ValueError("five")
        return item

    results = in_order(work, range(100), num_threads=3)
    assert [next(results) for _ in range(5)] == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(results)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_run_goes_on_and_answers_each_row_once(tmp_path):
    files, whole = Files(tmp_path), Files(tmp_path / "whole")
    whole.folder.mkdir()
    for each in (files, whole):
        each.write(*many(80))
    _, expected = whole.run()
    asked = tmp_path / "asked.txt"
    kept = []
    for at_least in (10, 35):  # killed twice
        process = subprocess.Popen([sys.executable, "-c", SLOW, str(tmp_path), str(asked)], env=_environment())
        while not files.target.exists() or files.target.read_bytes().count(b"\n") < at_least:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        kept.append(files.target.read_bytes().count(b"\n"))
    with files.target.open("ab") as file:  # what a kill in the middle of a write would leave
        file.write(b'{"id": "batch_req_s_12')
    again = set()
    summary, rows = files.run(lambda body: again.add(body["messages"][0]["content"]) or echo(body))
    assert rows == expected
    assert (summary.rows, summary.kept) == (80, kept[-1])
    assert 10 <= kept[0] < kept[1] < 80
    assert again == {f"question {number}" for number in range(kept[-1], 80)}


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_a_finished_run_loads_no_model(files):
    files.write(*many(3))
    files.run()
    before = files.target.read_bytes()
    summary, _ = files.run(answer=None)
    assert (summary.rows, summary.kept) == (3, 3)
    assert files.target.read_bytes() == before


def test_rows_that_joined_the_input_are_answered(files):
    files.write(*many(3))
    files.run()
    files.write(*many(5))
    summary, rows = files.run()
    assert (summary.kept, len(rows)) == (3, 5)


@pytest.mark.parametrize("overwrite", [False, True])
def test_another_input_is_refused_unless_told_to_overwrite(files, overwrite):
    files.write(*many(3))
    files.run()
    before = files.target.read_bytes()
    files.write(request("row-0", "question 0"), request("other"))
    if overwrite:
        _, rows = files.run(overwrite=True)
        assert [row["custom_id"] for row in rows] == ["row-0", "other"]
    else:
        with pytest.raises(ValueError, match=r"another input: its row 2 does not answer line 2;.*overwrite"):
            files.run()
        assert files.target.read_bytes() == before


def fail_odd(body):
    """Refuses the questions with odd numbers."""
    number = int(body["messages"][0]["content"].split()[1])
    refused = Reply(503, {"error": {"message": "too busy", "type": "server_error", "code": None}})
    return refused if number % 2 else echo(body)


def test_failed_rows_alone_are_asked_again_and_stand_in_their_place(files):
    files.write(*many(20), "no JSON")
    assert files.run(fail_odd)[0].errors == 11
    again = []
    summary, rows = files.run(lambda body: again.append(body) or echo(body), retry_failed=True)
    assert (len(again), summary.rows, summary.kept, summary.errors) == (10, 21, 10, 1)
    assert texts(rows[:20]) == [f"question {number}" for number in range(20)]
    assert sorted(path.name for path in files.folder.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_without_failed_rows_the_second_try_is_an_ordinary_run(files):
    files.write(*many(3))
    files.run()
    files.write(*many(5))
    summary, rows = files.run(retry_failed=True)
    assert (summary.kept, len(rows)) == (3, 5)


def test_rows_that_were_never_answered_are_asked_with_the_failed_ones(files):
    files.write(*many(6))
    files.run(fail_odd)
    whole = files.target.read_bytes().splitlines(keepends=True)
    files.target.write_bytes(b"".join(whole[:4]) + whole[4][:20])
    summary, rows = files.run(retry_failed=True)
    assert (summary.kept, summary.errors, len(rows)) == (2, 0, 6)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="Windows has no SIGKILL")
def test_a_killed_second_try_goes_on_and_asks_each_row_once_more(tmp_path):
    files = Files(tmp_path)
    files.write(*many(60))
    files.run(fail_odd)
    before, new = files.target.read_bytes(), tmp_path / "out.jsonl.retry"
    asked = tmp_path / "asked.txt"
    process = subprocess.Popen([sys.executable, "-c", RETRY, str(tmp_path), str(asked)], env=_environment())
    while not new.exists() or new.read_bytes().count(b"\n") < 20:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert files.target.read_bytes() == before
    kept = new.read_bytes().count(b"\n")
    with new.open("ab") as file:
        file.write(b'{"id": "batch_req_s_12')
    again = set()
    _summary, rows = files.run(lambda body: again.add(body["messages"][0]["content"]) or echo(body), retry_failed=True)
    assert texts(rows) == [f"question {number}" for number in range(60)]
    assert again == {f"question {number}" for number in range(kept, 60) if number % 2}
    assert not new.exists()


def test_what_a_second_try_has_left_does_not_outlive_a_new_start(files):
    files.write(*many(4))
    files.run(fail_odd)
    new = files.folder / "out.jsonl.retry"
    new.write_bytes(b"".join(files.target.read_bytes().splitlines(keepends=True)[:3]))
    files.run(overwrite=True)
    assert not new.exists()
    files.run(fail_odd, overwrite=True)
    new.write_text("my notes\n")
    with pytest.raises(ValueError, match=r"out\.jsonl\.retry is not the output .* so remove it"):
        files.run(retry_failed=True)
    assert new.read_text() == "my notes\n"


def test_the_summary_says_why_rows_failed(files):
    files.write(*many(5), "no JSON", "[]")
    summary, _ = files.run(fail_odd)
    assert summary.to_dict()["failures"] == {
        "503 server_error": {"rows": 2, "message": "too busy"},
        "invalid_json_line": {
            "rows": 2,
            "message": "line 6: it is not JSON (Expecting value: line 1 column 1 (char 0))",
        },
    }
    assert str(summary).splitlines()[2] == "2 x 503 server_error: too busy"


def test_other_settings_are_refused(files):
    files.write(*many(3))
    files.run()
    with pytest.raises(ValueError, match="another model or other options; repeat those; add --overwrite"):
        files.run(settings="t")


def test_a_shorter_input_is_refused(files):
    files.write(*many(3))
    files.run()
    files.write(*many(2))
    with pytest.raises(ValueError, match="more rows than the input: line 3"):
        files.run()


def test_a_file_of_somebody_else_is_not_touched(files):
    files.write(*many(3))
    files.target.write_text("my notes\n")
    with pytest.raises(ValueError, match="not the output of a batch: line 1"):
        files.run()
    assert files.target.read_text() == "my notes\n"


def test_an_old_output_is_kept_until_the_model_is_loaded(files):
    def broken():
        raise ValueError("no such model")

    files.write(*many(2))
    files.target.write_text("precious\n")
    with pytest.raises(ValueError, match="no such model"):
        run_batch(files.source, files.target, broken, {}, overwrite=True)
    assert files.target.read_text() == "precious\n"


def test_two_runs_cannot_write_one_output(files):
    files.write(*many(2))
    with only_writer(files.target), pytest.raises(ValueError, match="another process is writing"):
        files.run()
    files.run()


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_two_runs_cannot_write_one_output_through_a_link(files):
    files.write(*many(2))
    files.target.touch()
    link = files.folder / "link.jsonl"
    link.symlink_to(files.target)
    with only_writer(link), pytest.raises(ValueError, match="another process is writing"):
        files.run()


def test_the_input_is_not_its_own_output(files):
    files.write(*many(2))
    files.target = files.source
    with pytest.raises(ValueError, match="both input and output"):
        files.run()


def test_an_output_that_cannot_be_written_is_refused(files):
    files.write(*many(2))
    for target, said in ((files.folder, "not a file"), (files.folder / "none" / "out.jsonl", "there is no folder")):
        files.target = target
        with pytest.raises(ValueError, match=said):
            files.run()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no such pipes")
def test_an_input_that_can_be_read_only_once_is_refused(files):
    os.mkfifo(files.source)
    with pytest.raises(ValueError, match="not a regular file"):
        files.run()


def test_a_full_disk_ends_the_run_with_the_remedy_and_it_goes_on(files, monkeypatch):
    files.write(*many(20))

    class Full:
        """A file on a disk with room for 1,000 bytes."""

        def __init__(self, file):
            self.file = file

        def write(self, content):
            room = 1000 - self.file.tell()
            if room <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(content[:room])

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

    monkeypatch.setattr("tokenpacker.whole_files.open", lambda *args: Full(open(*args)), raising=False)  # noqa: SIM115
    with pytest.raises(OSError, match=r"No space left on device; the rows written so far are kept.*out\.jsonl"):
        files.run()
    monkeypatch.undo()
    assert files.target.stat().st_size == 1000
    summary, rows = files.run()
    assert 0 < summary.kept < 20
    assert texts(rows) == [f"question {number}" for number in range(20)]


def test_a_row_is_in_the_file_before_the_next_is_answered(files):
    """A kill loses nothing that was counted as done."""
    files.write(*many(20))
    seen, lock = [], threading.Lock()

    def watch(body):
        with lock:
            seen.append(len(read(files.target)) if files.target.exists() else 0)
        return echo(body)

    files.run(watch, concurrency=1)
    assert max(seen) >= 20 - AHEAD - 1
