"""A whole comparison: all runs that have no row yet, one after the other or side by side, then times and the report."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenpacker.compare.figure import require_matplotlib
from tokenpacker.compare.latency import measure_speed, speed_fingerprint
from tokenpacker.compare.one_run import RUNS, TILES, run_one
from tokenpacker.compare.report import write_report
from tokenpacker.compare.results import RESULTS, RUN, SPEED, Row, append_row, latest, read_rows
from tokenpacker.compare.runs import Comparison, Run
from tokenpacker.compare.tiles import ONE_TILE, encode_test_tiles
from tokenpacker.progress import Progress
from tokenpacker.speed.machine import usable_cores
from tokenpacker.train.assemble import assemble

LOG = "log.txt"
LOOK_SECONDS = 1.0  # between looks into the logs of runs side by side


def compare(comparison: Comparison, output: Path, *, jobs: int = 1, command: str = "") -> bool:
    """Runs what has no row in `output/results.jsonl`, then writes the report; False where a signal stopped it.

    Args:
        jobs: runs side by side, each with its share of the cores. One runs in this process, several in their own.
        command: the command line for the rows.

    Raises:
        ValueError: for data, models, projectors and scale factors that do not exist or do not fit.
        ImportError: without matplotlib, which the report needs.
    """
    require_matplotlib()  # now, rather than after hours
    path, runs = output / RESULTS, comparison.runs()
    leads = int(os.environ.get("RANK", "0")) == 0  # other processes of a distributed run only take part in training
    finished = latest(read_rows(path), RUN)
    todo = [run for run in runs if comparison.fingerprint(run) not in finished]
    if todo and comparison.is_tested and not torch.cuda.is_available():
        model, processor = assemble(comparison.stages(todo[0])[0])
        encode_test_tiles(output / TILES, model.eval(), processor, comparison.limit, comparison.foundation)
    done = len(runs) - len(todo)
    # A single run shows a progress of its own.
    with Progress("runs", len(runs), done=done, shown=jobs > 1) as shown:
        for row in _rows(comparison, todo, output, jobs, command, shown):
            if row is None:
                return False
            if leads:
                append_row(path, row)
            done += 1
            print(f"{done} of {len(runs)}: {_row_text(row)}", file=sys.stderr)
            shown.update(done)
    if not leads:
        return True
    if speed_fingerprint(comparison) not in latest(read_rows(path), SPEED):
        append_row(path, measure_speed(comparison, command=command))
    shown_rows = {speed_fingerprint(comparison), *map(comparison.fingerprint, runs)}  # the folder may have others
    write_report(output, [row for row in read_rows(path) if row["fingerprint"] in shown_rows])
    return True


def _row_text(row: Row) -> str:
    scores = [
        f"{task} {mode} {100 * score['correct'] / score['questions']:.1f} %"
        for task, modes in row["scores"].items()
        for mode, score in modes.items()
        if mode == ONE_TILE or score != modes[ONE_TILE]
    ]
    result = ", ".join(scores) or f"loss {row['losses']['instruct']:.3f}"
    run = f"{row['projector']}, {row['tokens_per_tile']} tokens, seed {row['seed']}"
    return f"{run}: {result} ({row['seconds']['all']:.0f} s)"


def _rows(
    comparison: Comparison, todo: Sequence[Run], output: Path, jobs: int, command: str, shown: Progress
) -> Iterator[Row | None]:
    """Each run's row as it is finished; None at last after a signal.

    If one of several runs fails, no other starts, and the error is raised after the running ones have finished.
    """
    run = partial(run_one, comparison, output=output, command=command)
    if jobs == 1:
        yield from map(run, todo)
        return
    folders = {one: output / RUNS / comparison.fingerprint(one) for one in todo}
    threads = max(1, usable_cores() // jobs)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        left, failure = iter(todo), None
        running: dict[Future[Row | None], Run] = {}
        try:
            with _termination_as_interrupt():
                while True:
                    if failure is None:  # only as many as run at once, so that none waits when a signal comes
                        for one in itertools.islice(left, jobs - len(running)):
                            running[pool.submit(_logged, run, one, folders[one])] = one
                    if not running:
                        break
                    finished, _ = wait(running, LOOK_SECONDS, FIRST_COMPLETED)
                    for future in finished:
                        del running[future]
                        if future.exception() is None:
                            yield future.result()
                        failure = failure or future.exception()
                    last = [f"{one.label}: {_last_line(folders[one] / LOG)}" for one in running.values()]
                    shown.update(shown.done, "; ".join(last))
        except KeyboardInterrupt:  # the pool waits for its processes, which end with a checkpoint
            yield None
        if failure is not None:
            raise failure


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "starting")


def _logged(run: Callable[[Run], Row | None], one: Run, folder: Path) -> Row | None:
    """The run with its prints in a file, as several at once would mix. Raises ValueError with the run's label."""
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
    """Within it, SIGTERM goes on to the training processes and then ends the comparison as Ctrl-C does."""

    def stop(number: int, frame: Any) -> None:
        for process in multiprocessing.active_children():
            process.terminate()
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
