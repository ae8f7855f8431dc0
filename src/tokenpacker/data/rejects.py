"""What was left out of a data set, and why: counted, written down at once, and too much once it is too much.

Each line of the file is `{"id", "kind", "reason", "source"}`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from pathlib import Path

from tokenpacker.data.rows import RecordError

# Below it a share says little: of a data set with 0.5 % bad rows, the first 200 hold more than 1 % once in 12 times.
MIN_SEEN = 1000
# A reader that knows how many samples there are stops early only where so many times the share is bad in what it saw.
PLAINLY = 3


class TooManyRejects(ValueError):
    """So many samples were left out that the data, or its paths, must be wrong."""


class Rejects:
    """Counts what is seen and what is rejected.

    Every process may hold its own, on the same file: a line is written by one call that appends, so lines never mix,
    and each process stops at its own share. A reject that stands in the file already is counted but not written again,
    so neither epochs nor resumed runs repeat lines.

    Args:
        path: the file of rejects, made with its folder when the first one comes; None writes none.
        max_share: of the samples seen, between 0 and 1.
        min_seen: no stop before this many; `finish` has no such mercy.
        keep: False empties a file of an earlier run.
        num_samples: of all processes together. The share is then that of these, as the file has them from all
            processes since this one began: a reader's own part of the data may well hold more, by chance.

    Raises:
        ValueError: for a share outside 0..1.
    """

    def __init__(
        self,
        path: str | Path | None,
        max_share: float = 0.01,
        min_seen: int = MIN_SEEN,
        *,
        keep: bool = True,
        num_samples: int | None = None,
    ) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(f"max_share={max_share} must be between 0 and 1, such as 0.01 for one in a hundred")
        self.path = None if path is None else Path(path)
        self.max_share = max_share
        self.min_seen = min_seen
        self.num_accepted = 0
        self.counts: Counter[str] = Counter()
        if self.path is not None and not keep:
            self.path.unlink(missing_ok=True)
        self._written = _read_written(self.path)
        self.num_samples = num_samples
        self._num_before = len(self._written)
        self._met: set[tuple[str, str]] = set()

    @property
    def num_rejected(self) -> int:
        """Samples left out."""
        return sum(self.counts.values())

    @property
    def num_seen(self) -> int:
        """Samples used and left out."""
        return self.num_accepted + self.num_rejected

    @property
    def share(self) -> float:
        """Rejected of seen, 0 where nothing was seen."""
        return self.num_rejected / self.num_seen if self.num_seen else 0.0

    def accept(self, count: int = 1) -> None:
        """Counts usable samples."""
        self.num_accepted += count

    def reject(self, error: RecordError) -> None:
        """Counts and writes down one sample. Raises TooManyRejects when these are more than the share."""
        self.counts[error.kind] += 1
        self._write(error)
        if self.num_samples is not None:
            self._met.add((error.id, error.reason))
            self._judge_all(self.num_samples)
        elif self.num_seen >= self.min_seen:
            self.finish()

    def _judge_all(self, num_samples: int) -> None:
        count = max(len(self._met), len(_read_written(self.path)) - self._num_before)
        if count > self.max_share * num_samples:
            self._stop(count, num_samples)
        if self.num_seen >= MIN_SEEN and self.share > PLAINLY * self.max_share:
            self.finish()

    def finish(self) -> None:
        """Raises TooManyRejects when more than the share was rejected; for the end of a data set of any size."""
        if self.share <= self.max_share:
            return
        self._stop(self.num_rejected, self.num_seen)

    def _stop(self, num_rejected: int, num_seen: int) -> None:
        kinds = ", ".join(f"{count} {kind}" for kind, count in self.counts.most_common())
        written = "" if self.path is None else f"see {self.path}, "
        raise TooManyRejects(
            f"{num_rejected} of {num_seen} samples ({num_rejected / num_seen:.1%}) cannot be used, more than"
            f" data.max_reject_share={self.max_share:g} allows: {kinds}; {written}mend the data or the folder of"
            " images, or raise data.max_reject_share"
        )

    def _write(self, error: RecordError) -> None:
        if self.path is None or (error.id, error.reason) in self._written:
            return
        self._written.add((error.id, error.reason))
        row = {"id": error.id, "kind": error.kind, "reason": error.reason, "source": error.source}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row, ensure_ascii=False).encode(errors="replace") + b"\n"
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, line)
        finally:
            os.close(handle)


def _read_written(path: Path | None) -> set[tuple[str, str]]:
    """(id, reason) of each line; a line that a crash cut off is skipped."""
    written: set[tuple[str, str]] = set()
    if path is None or not path.is_file():
        return written
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            written.add((row["id"], row["reason"]))
    return written
