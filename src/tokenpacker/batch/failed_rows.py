"""Failed rows of an output, answered again: they and the rows that did not fail make a new file in the same order.

The new file stands beside the output and replaces it when it is whole. A run that is killed before goes on with it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from tokenpacker.batch.batch_output import check_kept, output_rows
from tokenpacker.batch.batch_rows import Outputs, Row, is_failed


class FailedRows:
    """The second try of the failed rows of an output.

    Args:
        target: the output, which was checked against the input.
        end: where its whole rows end, in bytes.

    Attributes:
        path: the new file.
    """

    def __init__(self, target: Path, end: int):
        self.target, self.end = target.resolve(), end
        self.path = self.target.with_name(f"{self.target.name}.retry")

    def check(self, rows: Iterator[Row], on_row: Callable[[dict[str, Any]], None]) -> int:
        """Takes the rows that a killed run has written as `check_kept` does; returns where they end, in bytes.

        Raises:
            ValueError: if another run has written them.
        """
        self.done = 0

        def count(output: dict[str, Any]) -> None:
            self.done += 1
            on_row(output)

        try:
            return check_kept(self.path, rows, count)
        except ValueError as error:
            said = str(error).partition(";")[0]
            raise ValueError(f"{said}; failed rows are collected in this file, so remove it") from None

    def to_answer(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Those of the remaining rows that failed or have no output."""
        for output in self._old():
            row = next(rows)
            if is_failed(output):
                yield row
        yield from rows

    def merged(self, output_of: Outputs, on_kept: Callable[[], None]) -> Outputs:
        """`output_of`, with the outputs of the other rows in between; `on_kept` is called before each of those."""

        def outputs(rows: Iterable[Row]) -> Iterator[dict[str, Any]]:
            new = iter(output_of(rows))
            for old in self._old():
                if not is_failed(old):
                    on_kept()
                yield next(new) if is_failed(old) else old
            yield from new

        return outputs

    def finish(self) -> None:
        """The new file becomes the output."""
        shutil.copymode(self.target, self.path)
        os.replace(self.path, self.target)

    def _old(self) -> Iterator[dict[str, Any]]:
        return islice(output_rows(self.target, self.end), self.done, None)
