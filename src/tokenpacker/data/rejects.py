"""The records that were left out, and why: counted, written down at once, and an error when there are too many.

Each line of the file is `{"id", "kind", "reason", "source"}`.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from pathlib import Path

from tokenpacker.data.rows import RecordError

# A share of fewer says little: if 0.5 % of the rows are bad, the first 200 have more than 1 % once in 12 times.
MIN_SEEN = 1000
# A reader that knows the size of the data stops early only if the share of what it saw is so many times too high.
PLAINLY = 3


class TooManyRejects(ValueError):
    """So many records were left out that the data or its paths must be wrong."""


class Rejects:
    """Counts what is seen and what is rejected.

    Every process may have its own on the same file: one call appends a whole line, so lines never mix, and each process
    stops at its own share. A reject that the file has already is counted but not written again, so epochs and resumed
    runs do not repeat lines.

    Args:
        path: the file of rejects, made with its folder for the first one; None writes none.
        max_share: of the samples seen, between 0 and 1.
        min_seen: samples before which it does not stop; `finish` always judges.
        keep: False empties the file of an earlier run.
        num_samples: of the whole data set. The share is then of these, and counts the rejects that all processes have
            written since this one began: the part that one process reads may have more by chance.

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
        self.num_samples = num_samples
        self.num_accepted = 0
        self.counts: Counter[str] = Counter()
        if self.path is not None and not keep:
            self.path.unlink(missing_ok=True)
        self._written = _read_written(self.path)
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
        """Rejected of seen; 0 before anything is seen."""
        return self.num_rejected / self.num_seen if self.num_seen else 0.0

    def accept(self, count: int = 1) -> None:
        """Counts usable samples."""
        self.num_accepted += count

    def reject(self, error: RecordError) -> None:
        """Counts and writes down one sample. Raises TooManyRejects if there are more than the share."""
        self.counts[error.kind] += 1
        self._write(error)
        if self.num_samples is None:
            if self.num_seen >= self.min_seen:
                self.finish()
            return
        self._met.add((error.id, error.reason))
        count = max(len(self._met), len(_read_written(self.path)) - self._num_before)
        if count > self.max_share * self.num_samples:
            self._stop(count, self.num_samples)
        if self.num_seen >= MIN_SEEN and self.share > PLAINLY * self.max_share:
            self.finish()

    def finish(self) -> None:
        """Judges a data set of any size at its end. Raises TooManyRejects if more than the share was rejected."""
        if self.share > self.max_share:
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
        with self.path.open("ab", buffering=0) as file:  # one write to the end of the file: lines never mix
            file.write(line)


def _read_written(path: Path | None) -> set[tuple[str, str]]:
    """(id, reason) of each line. A line that a crash cut off is skipped."""
    written: set[tuple[str, str]] = set()
    if path is None or not path.is_file():
        return written
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            row = json.loads(line)
            written.add((row["id"], row["reason"]))
    return written
