"""A batch from its first check to its summary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tokenpacker.batch.batch_output import OutputRows, check_kept, only_writer
from tokenpacker.batch.batch_rows import (
    OpenAnswer,
    Outputs,
    Prepare,
    check_input,
    fingerprint,
    output_row,
    read_rows,
)
from tokenpacker.batch.in_order import in_order
from tokenpacker.batch.ray_workers import ray_outputs
from tokenpacker.batch.request_bodies import prepared_body
from tokenpacker.progress import Progress


@dataclass
class BatchSummary:
    """What is in the output.

    Args:
        kept: rows that an earlier run had answered.
        errors: rows without an answer: those with an error, and those with a status that is not 200.
        image_tokens: tokens of all images in the prompts, where the server says so.
        seconds: of this run, without loading the model.
    """

    rows: int = 0
    kept: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def add(self, output: dict[str, Any]) -> None:
        """Counts an output row."""
        self.rows += 1
        response = output["response"]
        if response is None or response["status_code"] != 200:
            self.errors += 1
            return
        body = response["body"]
        self.prompt_tokens += _tokens(body, "prompt_tokens")
        self.completion_tokens += _tokens(body, "completion_tokens")
        self.image_tokens += _tokens(body, "prompt_tokens_details", "image_tokens")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dict."""
        return {**asdict(self), "seconds": round(self.seconds, 1)}

    def __str__(self) -> str:
        """Two lines for people."""
        kept = f" ({self.kept:,} of them from an earlier run)" if self.kept else ""
        return (
            f"{self.rows:,} rows{kept}, {self.errors:,} errors, {self.seconds:.1f} s\n"
            f"{self.image_tokens:,} image tokens of {self.prompt_tokens:,} prompt tokens;"
            f" {self.completion_tokens:,} tokens answered"
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
    summary = BatchSummary()
    with only_writer(target):
        rows = read_rows(source, fingerprint(all_settings))
        end = 0 if overwrite else check_kept(target, rows, summary.add)
        summary.kept = summary.rows
        if (first := next(rows, None)) is None:
            return summary
        with outputs as output_of, OutputRows(target, end) as written:
            started = time.monotonic()
            with Progress("batch", total, done=summary.rows) as shown:
                for output in output_of(itertools.chain([first], rows)):
                    written.append(output)
                    summary.add(output)
                    shown.update(summary.rows, f"{summary.errors:,} errors")
            summary.seconds = time.monotonic() - started
    return summary


@contextmanager
def _outputs_here(open_answer: OpenAnswer, prepare: Prepare, concurrency: int) -> Iterator[Outputs]:
    with open_answer() as answer:
        yield lambda rows: in_order(lambda row: output_row(row, answer, prepare), rows, concurrency)
