"""All runs that have no row yet, one after the other or several side by side, then the times, then the report."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenpacker.compare.figure import require_matplotlib
from tokenpacker.compare.latency import OnProgress, measure_speed, speed_fingerprint
from tokenpacker.compare.one_run import RUNS, TILES, run_one
from tokenpacker.compare.report import write_report
from tokenpacker.compare.results import RESULTS, RUN, SPEED, Row, append_row, latest, read_rows
from tokenpacker.compare.runs import Comparison, Run
from tokenpacker.compare.tiles import encode_test_tiles
from tokenpacker.progress import LINE_SECONDS
from tokenpacker.speed.machine import usable_cores
from tokenpacker.train.assemble import assemble

LOG = "log.txt"
OnWait = Callable[[Run, str], None]


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What is told while a comparison runs; each does nothing until it is given."""

    on_row: Callable[[Row, int, int], None] = field(default=lambda row, done, total: None)
    on_wait: OnWait = field(default=lambda run, line: None)  # every half minute: what a run of several has said last
    on_speed: OnProgress = field(default=lambda done, total, what: None)


def compare(
    comparison: Comparison,
    output: Path,
    *,
    jobs: int = 1,
    command: str = "",
    progress: Progress | None = None,
) -> bool:
    """Runs what has no row in `output/results.jsonl`, then writes the report; False where a signal ended it before.

    Args:
        jobs: runs side by side, each with its share of the cores. One runs here, more in processes of their own.
        command: that results say they came from.

    Raises:
        ValueError: as `train.run.train`, and for projectors and scale factors that do not fit.
        ImportError: without matplotlib, which the report needs.
    """
    require_matplotlib()  # told now, and not hours later
    progress = progress or Progress()
    path, runs = output / RESULTS, comparison.runs()
    leads = int(os.environ.get("RANK", "0")) == 0  # the others of a distributed run only train along
    finished = latest(read_rows(path), RUN)
    todo = [run for run in runs if comparison.fingerprint(run) not in finished]
    if todo and comparison.is_tested and not torch.cuda.is_available():
        model, processor = assemble(comparison.stages(todo[0])[0])
        encode_test_tiles(output / TILES, model.eval(), processor, comparison.limit, comparison.foundation)
    done = len(runs) - len(todo)
    for row in _rows(comparison, todo, output, jobs, command, progress.on_wait):
        if row is None:
            return False
        if leads:
            append_row(path, row)
        done += 1
        progress.on_row(row, done, len(runs))
    if not leads:
        return True
    if speed_fingerprint(comparison) not in latest(read_rows(path), SPEED):
        append_row(path, measure_speed(comparison, command=command, on_progress=progress.on_speed))
    shown = {speed_fingerprint(comparison), *map(comparison.fingerprint, runs)}  # not what else was compared here
    write_report(output, [row for row in read_rows(path) if row["fingerprint"] in shown])
    return True


def _rows(
    comparison: Comparison, todo: Sequence[Run], output: Path, jobs: int, command: str, on_wait: OnWait
) -> Iterator[Row | None]:
    """Each run's row as it is finished; None, and then no more, after a signal.

    Where one of several side by side fails, no other is started, and those that go on are finished before it is told.
    """
    run = partial(run_one, comparison, output=output, command=command)
    if jobs == 1:
        yield from map(run, todo)
        return
    threads = max(1, usable_cores() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:

        def started(runs: Iterable[Run]) -> dict[Future[Row | None], Run]:
            return {pool.submit(_logged, run, one, output / RUNS / comparison.fingerprint(one)): one for one in runs}

        left, failure = iter(todo), None
        running = started(itertools.islice(left, jobs))  # no more: a signal must find none that waits
        try:
            with _termination_as_interrupt():
                while running:
                    finished, _ = wait(running, LINE_SECONDS, FIRST_COMPLETED)
                    if not finished:
                        for one in running.values():
                            on_wait(one, _last_line(output / RUNS / comparison.fingerprint(one) / LOG))
                    for future in finished:
                        del running[future]
                        if future.exception() is None:
                            yield future.result()
                        failure = failure or future.exception()
                    if failure is None:
                        running |= started(itertools.islice(left, len(finished)))
        except KeyboardInterrupt:  # on leaving, the pool waits for its processes; they end with a checkpoint
            yield None
        if failure is not None:
            raise failure


def _last_line(log: Path) -> str:
    """What a run has said last."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "starting")


def _logged(run: Callable[[Run], Row | None], one: Run, folder: Path) -> Row | None:
    """The run, with what it prints in a file: several at once would write over each other.

    Raises: ValueError as `run`, with the run's name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (
        (folder / LOG).open("a", encoding="utf-8", errors="backslashreplace", buffering=1) as log,
        contextlib.redirect_stderr(log),
        contextlib.redirect_stdout(log),
    ):
        print(time.strftime("%Y-%m-%d %H:%M:%S"), one.label)
        try:
            return run(one)
        except ValueError as error:
            raise ValueError(f"{one.label}: {error}") from error
        except Exception:
            traceback.print_exc()  # into the file
            raise


@contextlib.contextmanager
def _termination_as_interrupt() -> Iterator[None]:
    """Within it, SIGTERM reaches the processes that train, too, and then ends the comparison as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        for process in multiprocessing.active_children():
            process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
