"""A batch from its first check to its summary."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tokenpacker.batch.batch_output import OutputRows, check_kept, only_writer
from tokenpacker.batch.batch_rows import Row, check_input, read_rows
from tokenpacker.progress import Progress

Outputs = Callable[[Iterable[Row]], Iterator[dict[str, Any]]]
"""Makes the output rows of rows, in order."""


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
        usage = response["body"].get("usage") or {}
        self.prompt_tokens += usage.get("prompt_tokens") or 0
        self.completion_tokens += usage.get("completion_tokens") or 0
        self.image_tokens += (usage.get("prompt_tokens_details") or {}).get("image_tokens") or 0

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


def run_batch(
    source: Path,
    target: Path,
    settings: str,
    open_outputs: Callable[[], AbstractContextManager[Outputs]],
    *,
    overwrite: bool = False,
) -> BatchSummary:
    """Answers all rows of `source` that are not answered in `target`, in order.

    Args:
        settings: the fingerprint of everything that changes answers.
        open_outputs: loads the model; called if there is something to answer.
        overwrite: starts anew if `target` exists.

    Raises:
        ValueError: if `source` holds no request, or `target` is of another run.
        OSError: if the disk is full or the endpoint is gone.
    """
    total = check_input(source)
    if target.exists() and target.samefile(source):
        raise ValueError(f"{target} is both input and output; choose another output")
    summary = BatchSummary()
    with only_writer(target):
        rows = read_rows(source, settings)
        end = 0 if overwrite else check_kept(target, rows, summary.add)
        summary.kept = summary.rows
        if (first := next(rows, None)) is None:
            return summary
        with open_outputs() as outputs, OutputRows(target, end) as written:
            started = time.monotonic()
            with Progress("batch", total, done=summary.rows, written="{:,} rows".format) as shown:
                for output in outputs(itertools.chain([first], rows)):
                    written.append(output)
                    summary.add(output)
                    shown.update(summary.rows, f"{summary.errors:,} errors")
            summary.seconds = time.monotonic() - started
    return summary
