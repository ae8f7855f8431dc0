"""COCO's run-length encoding of masks: lengths of runs of 0 and 1 in turn, zeros first, column by column.

Nothing here trusts its input: runs are counted before they are read, and added up before a mask is made, of which only
the columns with ones are.

Shapes: K runs, in a text of n characters.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from tokenpacker.hf.regions.rasterize import MarkedPixels

MAX_CHARACTERS = 9  # of one number in a compressed RLE, 45 bits; no image has runs as long
MAX_RUNS = 1 << 20  # of a mask, which bounds the time to a quarter of a second; people's masks have some thousands


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
    read = _decompress if isinstance(counts, (str, bytes)) else _plain_runs
    runs = _checked(read(counts, height * width, name), (height, width), name)  # (K,)
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


def _checked(runs: np.ndarray, image_size: tuple[int, int], name: str) -> np.ndarray:
    """The runs (K,), which must fill the image."""
    height, width = image_size
    if runs.size and runs.min() < 0:
        raise _broken(name, "a run below 0")
    total = int(runs.sum())
    if total != height * width:
        added_up = "more" if total > height * width else total
        raise _broken(name, f"runs that add up to {added_up}, where {height}x{width} has {height * width} pixels")
    return runs


def _check_number(num_runs: int, num_pixels: int, name: str) -> None:
    if num_runs > num_pixels + 2:  # of a mask of single pixels the first and the last run may be empty
        raise _broken(name, f"more runs than pixels, {num_runs} for {num_pixels}")
    if num_runs > MAX_RUNS:
        raise ValueError(f"{name} is an RLE of {num_runs} runs; at most {MAX_RUNS} are read: pass a boolean array")


def _plain_runs(counts: Any, num_pixels: int, name: str) -> np.ndarray:
    """(K,) of counts that are a list; as int64, where none exceeds the image."""
    kinds = set(map(type, counts)) if isinstance(counts, Sequence) else {type(None)}
    if not all(issubclass(kind, numbers.Integral) and kind is not bool for kind in kinds):
        raise _broken(name, "its counts are neither text nor whole numbers")
    _check_number(len(counts), num_pixels, name)
    if counts and min(counts) < 0:
        raise _broken(name, "a run below 0")
    if counts and max(counts) > num_pixels:
        raise _broken(name, f"runs that add up to more than {num_pixels} pixels")
    return np.array(counts, dtype=np.int64)


def _decompress(counts: str | bytes, num_pixels: int, name: str) -> np.ndarray:
    """(K,) of COCO's text form: six bits a character above "0", of which five count and one says that more follow.

    Numbers are in two's complement, low bits first; from the fourth on, a run is the difference to the one two before.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8) - np.uint8(48)  # (n,); what lies below "0" becomes too large
    last = np.flatnonzero(codes & 32 == 0)  # (K,) where numbers end
    _check_number(len(last), num_pixels, name)
    starts = np.concatenate([[0], last + 1])  # (K + 1,), behind the last number, too
    lengths = np.diff(starts, append=len(codes))
    wrong = [*np.flatnonzero(codes >= 64)[:1], *(starts[lengths > MAX_CHARACTERS][:1] + MAX_CHARACTERS)]
    if wrong:
        raise _broken(name, f"character {min(wrong) + 1} of its counts cannot stand there")
    if lengths[-1]:
        raise _broken(name, "its counts end within a number")
    starts, lengths = starts[:-1], lengths[:-1]
    places = np.arange(len(codes)) - np.repeat(starts, lengths)  # (n,) of a character in its number
    digits = (codes & 31).astype(np.int64) << (5 * places)
    values = np.add.reduceat(digits, starts) if len(starts) else np.zeros(0, np.int64)  # (K,)
    values -= np.where(codes[last] & 16, np.int64(1) << (5 * lengths), 0)
    if values.size and np.abs(values).max() > num_pixels:
        raise _broken(name, f"runs that add up to more than {num_pixels} pixels")
    for chain in (values[1::2], values[2::2]):
        np.cumsum(chain, out=chain)
    return values


def _broken(name: str, what: str) -> ValueError:
    return ValueError(f"{name} is a broken RLE: {what}; encode it again")
