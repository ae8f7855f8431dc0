"""A whole probe: the pictures' features, all runs that have no row yet, side by side, then the report."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tokenpacker.compare.figure import require_matplotlib
from tokenpacker.compare.probe.contract import Split
from tokenpacker.compare.probe.encoders import BATCH, Encoded, encode, missing
from tokenpacker.compare.probe.probe_plan import Probe, ProbeRun, blank_features
from tokenpacker.compare.probe.probe_report import SKIPPED, write_report
from tokenpacker.compare.probe.reading import BATCH as STEP_BATCH
from tokenpacker.compare.probe.reading import CURVE, Learner, begin_process, read
from tokenpacker.compare.results import RESULTS, RUN, Row, append_row, latest, read_rows
from tokenpacker.progress import Progress
from tokenpacker.speed.machine import describe_machine, usable_cores
from tokenpacker.whole_files import only_writer

FEATURES = "features"
LOOK_SECONDS = 1.0  # between looks at runs side by side
ASK_SHARE = 0.35  # of the time of a step: asking as many pictures as a step learns from


def probe(asked: Probe, output: Path, *, jobs: int | None = None, command: str = "") -> None:
    """Runs what has no row in `output/results.jsonl`, then writes the report.

    A run that a kill ends starts anew; what is finished is kept.

    Args:
        jobs: runs side by side, each with its share of the cores; None takes one a core.
        command: the command line for the rows.

    Raises:
        ValueError: if another process writes the same output.
        ImportError: without matplotlib, which the report needs.
    """
    require_matplotlib()  # now, rather than after minutes
    output.mkdir(parents=True, exist_ok=True)
    path = output / RESULTS
    with only_writer(path):
        finished = latest(read_rows(path), RUN)
        runs = {asked.fingerprint(run): run for run in asked.runs}
        todo = [run for fingerprint, run in runs.items() if fingerprint not in finished]
        jobs = min(jobs or usable_cores(), max(1, len(todo)))
        for entry in asked.skipped:
            print(SKIPPED.format(**entry), file=sys.stderr)
        if todo:
            _say_how_long(asked, len(runs), todo, output / FEATURES, jobs)
            encoded = encode(asked.material, asked.frozen, asked.counts, output / FEATURES)
            total = sum(run.steps for run in runs.values())
            begun = total - sum(run.steps for run in todo)
            with Progress("steps", total, done=begun) as shown:
                for count, (run, measured) in enumerate(_results(asked, todo, encoded, jobs, shown), 1):
                    append_row(path, _row(asked, run, measured, command))
                    result = f"{100 * measured['accuracy']:.1f} % ({measured['seconds']:.0f} s)"
                    print(f"{len(runs) - len(todo) + count} of {len(runs)}: {run.label}: {result}", file=sys.stderr)
        write_report(output, [row for row in read_rows(path) if row["fingerprint"] in runs], asked.skipped)


def _row(asked: Probe, run: ProbeRun, measured: dict[str, Any], command: str) -> Row:
    return {
        "kind": RUN,
        "protocol": asked.protocol,
        "fingerprint": asked.fingerprint(run),
        "quick": asked.quick,
        "questions": asked.questions,
        "encoder": asked.encoder,
        "split": asked.split,
        "projector": run.projector,
        "settings": run.config.to_dict(),
        "tokens": run.tokens,
        "steps": run.steps,
        "seed": run.seed,
        **measured,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": describe_machine(torch.device("cpu")),
    }


def _results(
    asked: Probe, todo: Sequence[ProbeRun], encoded: dict[Split, Encoded], jobs: int, shown: Progress
) -> Iterator[tuple[ProbeRun, dict[str, Any]]]:
    """What each run measured, as it is finished: one in this process, several in their own."""
    one = partial(
        read,
        num_classes=asked.material.num_classes,
        places=asked.material.places,
        sorts=asked.material.sorts,
        train=encoded["train"],
        test=encoded[asked.split],
    )
    if jobs == 1:
        for run in todo:
            done = shown.done
            seen = lambda step, done=done: shown.update(done + step)  # noqa: E731
            yield run, one(run.config, steps=run.steps, seed=run.seed, seen=seen)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, usable_cores() // jobs)
    with (
        ProcessPoolExecutor(jobs, context, initializer=begin_process, initargs=(threads,)) as pool,
        _ended_by_interrupt(pool),
    ):
        left = iter(todo)
        running: dict[Future[dict[str, Any]], ProbeRun] = {}
        while True:
            for run in itertools.islice(left, jobs - len(running)):  # no more than run at once
                running[pool.submit(one, run.config, steps=run.steps, seed=run.seed)] = run
            if not running:
                return
            for future in wait(running, LOOK_SECONDS, FIRST_COMPLETED).done:
                run = running.pop(future)
                shown.update(shown.done + run.steps)
                yield run, future.result()
            shown.update(shown.done)


@contextlib.contextmanager
def _ended_by_interrupt(pool: ProcessPoolExecutor) -> Iterator[None]:
    """Within it, what ends this process's work ends the running runs, too, which would go on for minutes."""
    try:
        yield
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():
            process.terminate()
        raise


def _say_how_long(asked: Probe, num_runs: int, todo: Sequence[ProbeRun], folder: Path, jobs: int) -> None:
    """Prints how many runs there are, and an estimate of their time from a step of each kind."""
    with _threads(max(1, usable_cores() // jobs)):
        step = {config: _step_seconds(asked, config) for config in dict.fromkeys(run.config for run in todo)}
    asking = ASK_SHARE * (len(CURVE) + 1) * asked.counts[asked.split] / STEP_BATCH  # in steps
    seconds = sum(step[run.config] * (run.steps + asking) for run in todo) / jobs
    text = f"{num_runs} runs, {len(todo)} to do: about {_time(seconds)} at the pace of now ({jobs} side by side)"
    if pictures := missing(asked.material, asked.frozen, asked.counts, folder):
        text += f"; before that about {_time(pictures * _picture_seconds(asked))} for features"
    print(text, file=sys.stderr)


def _step_seconds(asked: Probe, config: Any) -> float:
    learner = Learner(config, asked.frozen.patch_grid, asked.material.num_classes, steps=STEP_BATCH, seed=0)
    features = blank_features(config, asked.frozen.patch_grid, STEP_BATCH)
    targets = torch.zeros(STEP_BATCH, len(asked.material.num_classes), dtype=torch.long)
    return _second(lambda: learner.learn(features, targets))


def _picture_seconds(asked: Probe) -> float:
    def encode_some() -> None:
        asked.frozen.levels([asked.material.draw("train", number)[0] for number in range(BATCH)])

    return _second(encode_some) / BATCH


def _second(call: Callable[[], object]) -> float:
    """Seconds of a second call; the first one prepares memory."""
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time(seconds: float) -> str:
    return f"{max(1, round(seconds / 60))} min" if seconds >= 30 else "half a minute"
