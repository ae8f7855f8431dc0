"""COCO's run-length encoding of masks: lengths of runs of 0 and 1 in turn, zeros first, column by column.

Nothing here trusts its input: runs are added up before a mask is made, of which only the columns with ones are, and
reading ends where they leave the image.
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tokenpacker.hf.marks import MarkedPixels

MAX_RUN_BITS = 40  # of one number in a compressed RLE; no image has runs as long


def mark_runs(region: Mapping[str, Any], image_size: tuple[int, int], name: str) -> MarkedPixels | None:
    """What the runs of a dict with `size` and `counts` mark; None where they are all of 0.

    Raises:
        ValueError: for another size than the image's, counts that are no runs, and runs that do not fill the image.
    """
    height, width = image_size
    size, counts = (_listed(value) for value in (region.get("size"), region["counts"]))
    is_list = isinstance(size, Sequence) and all(isinstance(side, numbers.Real) for side in size)
    if not is_list or [*size] != [height, width]:
        raise ValueError(
            f"{name} is an RLE of size {' '.join(repr(size).split())[:60]} but its image is {height}x{width}; its size"
            " is [height, width] of the image as shown, after EXIF rotation"
        )
    unchecked = _decompress(counts, name) if isinstance(counts, (str, bytes)) else _plain_runs(counts, name)
    runs = _fill(unchecked, (height, width), name)
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


def _listed(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, Tensor)) else value


def _fill(runs: Iterable[int], image_size: tuple[int, int], name: str) -> list[int]:
    """The runs, which must fill an image; no more of them are taken than it can hold."""
    height, width = image_size
    pixels, total, taken = height * width, 0, []

    def broken(what: str) -> ValueError:
        return ValueError(
            f"{name} is a broken RLE: {what}, where {height}x{width} has {pixels} pixels; encode it again"
        )

    for run in runs:
        if run < 0:
            raise broken("a run below 0")
        total += run
        taken.append(run)
        if total > pixels:
            raise broken("runs that add up to more")
        if len(taken) > pixels + 2:  # of a mask of single pixels the first and the last run may be empty
            raise broken("more runs than pixels")
    if total < pixels:
        raise broken(f"runs that add up to {total}")
    return taken


def _plain_runs(counts: Any, name: str) -> Iterator[int]:
    runs = counts if isinstance(counts, Sequence) else [None]
    for run in runs:
        if not isinstance(run, numbers.Integral) or isinstance(run, bool):
            raise ValueError(f"{name} is a broken RLE: its counts are neither text nor whole numbers; encode it again")
        yield int(run)


def _decompress(counts: str | bytes, name: str) -> Iterator[int]:
    """The runs of COCO's text form: six bits a character above "0", of which five count and one says that more follow.

    Numbers are in two's complement, low bits first; from the fourth on, a run is the difference to the one two before.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    value, shift = 0, 0
    count, last, last_but_one = 0, 0, 0
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
        last, last_but_one = value + last_but_one if count > 2 else value, last
        yield last
        count, value, shift = count + 1, 0, 0
    if shift:
        raise ValueError(f"{name} is a broken RLE: its counts end within a number; encode it again")
