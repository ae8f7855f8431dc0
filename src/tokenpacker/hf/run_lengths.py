"""COCO's run-length encoding of masks: lengths of runs of 0 and 1 in turn, zeros first, column by column.

Nothing here trusts its input: runs are added up before a mask is made, and only the columns with ones are.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenpacker.hf.marks import MarkedPixels

MAX_RUN_BITS = 40  # of one number in a compressed RLE; no image has runs as long


def mark_runs(region: Mapping[str, Any], image_size: tuple[int, int], name: str) -> MarkedPixels | None:
    """What the runs of a dict with `size` and `counts` mark; None where they are all of 0.

    Raises:
        ValueError: for another size than the image's, counts that are no runs, and runs that do not fill the image.
    """
    height, width = image_size
    size, counts = region.get("size"), region["counts"]
    if not isinstance(size, (Sequence, np.ndarray)) or [*size] != [height, width]:
        raise ValueError(
            f"{name} is an RLE of size {size!r} but its image is {height}x{width}; its size is [height, width] of the"
            " image as shown, after EXIF rotation"
        )
    runs = _decompress(counts, name) if isinstance(counts, (str, bytes)) else _plain_runs(counts, name)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        wrong = "a run below 0" if min(runs, default=0) < 0 else f"runs of {sum(runs)} pixels in all"
        raise ValueError(
            f"{name} is a broken RLE: {wrong}, where {height}x{width} has {height * width}; encode it again"
        )
    ends = np.cumsum(runs)
    of_ones = np.arange(1, len(runs), 2)
    of_ones = of_ones[ends[of_ones] > ends[of_ones - 1]]
    if not len(of_ones):
        return None
    first_col, last_col = ends[of_ones[0] - 1] // height, (ends[of_ones[-1]] - 1) // height
    ends = np.clip(ends, first_col * height, (last_col + 1) * height)
    values = np.arange(len(runs)) % 2 == 1
    columns = np.repeat(values, np.diff(ends, prepend=first_col * height)).reshape(-1, height)
    return MarkedPixels.of(columns.T, left=int(first_col))


def _plain_runs(counts: Any, name: str) -> list[int]:
    whole = isinstance(counts, (Sequence, np.ndarray)) and all(
        isinstance(run, numbers.Integral) and not isinstance(run, bool) for run in counts
    )
    if not whole:
        raise ValueError(f"{name} is a broken RLE: its counts are neither text nor whole numbers; encode it again")
    return [int(run) for run in counts]


def _decompress(counts: str | bytes, name: str) -> list[int]:
    """The runs of COCO's text form: six bits a character above "0", of which five count and one says that more follow.

    Numbers are in two's complement, low bits first; from the fourth on, a run is the difference to the one two before.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    runs: list[int] = []
    value, shift = 0, 0
    for place, character in enumerate(text):
        bits = character - 48
        if not 0 <= bits < 64 or shift > MAX_RUN_BITS:
            raise ValueError(
                f"{name} is a broken RLE: character {place + 1} of its counts cannot stand there; encode it again"
            )
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError(f"{name} is a broken RLE: its counts end within a number; encode it again")
    return runs
