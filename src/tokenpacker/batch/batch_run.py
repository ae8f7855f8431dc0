"""A batch from its first check to its summary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tokenpacker.batch.batch_output import check_kept
from tokenpacker.batch.batch_rows import (
    OpenAnswer,
    Outputs,
    Prepare,
    check_input,
    failure,
    fingerprint,
    is_failed,
    output_row,
    read_rows,
    to_line,
)
from tokenpacker.batch.failed_rows import FailedRows
from tokenpacker.batch.in_order import in_order
from tokenpacker.batch.ray_workers import ray_outputs
from tokenpacker.batch.request_bodies import prepared_body
from tokenpacker.progress import Progress
from tokenpacker.whole_files import WholeLines, only_writer

SHOWN = 5  # kinds of failures in a summary for people


@dataclass
class BatchSummary:
    """What is in the output.

    Args:
        kept: rows that an earlier run had answered.
        errors: rows without an answer: those with an error, and those with a status that is not 200.
        failures: for each status and code of these rows, their number and the message of the first.
        image_tokens: tokens of all images in the prompts, where the server says so.
        seconds: of this run, without loading the model.
    """

    rows: int = 0
    kept: int = 0
    errors: int = 0
    failures: dict[str, dict[str, Any]] = field(default_factory=dict)
    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add(self, output: dict[str, Any]) -> None:
        """Counts an output row."""
        self.rows += 1
        if is_failed(output):
            self.errors += 1
            code, message = failure(output)
            self.failures.setdefault(code, {"rows": 0, "message": message})["rows"] += 1
            return
        body = output["response"]["body"]
        self.prompt_tokens += _tokens(body, "prompt_tokens")
        self.completion_tokens += _tokens(body, "completion_tokens")
        self.image_tokens += _tokens(body, "prompt_tokens_details", "image_tokens")

    def keep(self) -> None:
        """Counts a row of an earlier run, beside `add`."""
        self.kept += 1

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}

    def __str__(self) -> str:
        """Two lines for people, and one for each of the most frequent failures."""
        kept = f" ({self.kept:,} of them from an earlier run)" if self.kept else ""
        often = sorted(self.failures.items(), key=lambda failure: -failure[1]["rows"])
        lines = [f"\n{found['rows']:,} x {code}: {found['message']}" for code, found in often[:SHOWN]]
        lines += [f"\nand {len(often) - SHOWN} other kinds of failures"] * (len(often) > SHOWN)
        return (
            f"{self.rows:,} rows{kept}, {self.errors:,} errors, {self.seconds:.1f} s\n"
            f"{self.image_tokens:,} image tokens of {self.prompt_tokens:,} prompt tokens;"
            f" {self.completion_tokens:,} tokens answered" + "".join(lines)
        )


def _tokens(body: Any, *path: str) -> int:
    """A count in `usage`, or 0 if the server does not say."""
    for name in ("usage", *path):
        body = body.get(name) if isinstance(body, dict) else None
    return body if isinstance(body, int) else 0


def run_batch(
    source: Path,
    target: Path,
    open_answer: OpenAnswer,
    settings: dict[str, Any],
    *,
    defaults: dict[str, Any] | None = None,
    images: Path | None = None,
    concurrency: int = 32,
    ray: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    retry_failed: bool = False,
) -> BatchSummary:
    """Answers all rows of `source` that are not answered in `target`, in order.

    Args:
        open_answer: loads the model; called if there is something to answer, and with `ray` in each worker.
        settings: what changes its answers, such as the model.
        defaults: fields for bodies that lack them.
        images: start of image paths; None allows no paths.
        concurrency: most rows that are answered at a time, by each model.
        ray: address of Ray, as in `ray_workers`; None answers in this process.
        workers: models on Ray.
        overwrite: starts anew if `target` exists.
        retry_failed: answers the failed rows in `target` again too.

    Raises:
        ValueError: if `source` holds no request, or `target` is of another run.
        OSError: if the disk is full or the endpoint is gone.
    """
    total = check_input(source)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is both input and output; choose another output")
    source, images, defaults = source.resolve(), images and images.resolve(), defaults or {}
    prepare = partial(prepared_body, defaults=defaults, images=images)
    all_settings = {**settings, "defaults": defaults, "images": images and str(images)}
    if ray is None:
        outputs = _outputs_here(open_answer, prepare, concurrency)
    else:
        outputs = ray_outputs(ray, source, open_answer, prepare, workers=workers, concurrency=concurrency)
    read = partial(read_rows, source, fingerprint(all_settings))
    with only_writer(target):
        summary, rows = BatchSummary(), read()
        path, end, again = target, 0 if overwrite else check_kept(target, rows, summary.add), None
        if retry_failed and summary.errors:
            again, summary, rows = FailedRows(target, end), BatchSummary(), read()
            path, end = again.path, again.check(rows, summary.add)
            rows = again.to_answer(rows)
        summary.kept = summary.rows
        first = next(rows, None)
        if first is not None or again is not None:
            with outputs if first else _no_outputs() as output_of, WholeLines(path, end) as written:
                if again is None and end == 0:  # what an earlier try of failed rows has left is of no use any more
                    FailedRows(target, end).path.unlink(missing_ok=True)
                output_of = output_of if again is None else again.merged(output_of, summary.keep)
                _write(output_of(itertools.chain([first] if first else [], rows)), written, summary, total)
        if again is not None:
            again.finish()
    return summary


def _write(outputs: Iterator[dict[str, Any]], written: WholeLines, summary: BatchSummary, total: int) -> None:
    started = time.monotonic()
    with Progress("batch", total, done=summary.rows) as shown:
        for output in outputs:
            written.append(to_line(output))
            summary.add(output)
            shown.update(summary.rows, f"{summary.errors:,} errors")
    summary.seconds = time.monotonic() - started


@contextmanager
def _no_outputs() -> Iterator[Outputs]:
    yield lambda rows: iter(())


@contextmanager
def _outputs_here(open_answer: OpenAnswer, prepare: Prepare, concurrency: int) -> Iterator[Outputs]:
    with open_answer() as answer:
        yield lambda rows: in_order(lambda row: output_row(row, answer, prepare), rows, concurrency)
