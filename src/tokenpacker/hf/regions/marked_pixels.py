"""The pixels that boxes, polygons and run lengths mark. Only the part of an image that a region lies in is drawn.

pycocotools was tried for both: of a polygon it marks other pixels than those whose centre lies inside, and for run
lengths that do not fill their image it may return uninitialised memory ("0" * 100).

Shapes: H, W an image, h, w the part of it that a region lies in, K corners of an outline, or runs, in a text of n
characters.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

EDGES_AT_ONCE = 1 << 20  # rows of pixels that edges cross at a time; bounds the memory, whatever the polygon
MAX_CHARACTERS = 9  # of one number in a compressed RLE, 45 bits; no image has runs as long
MAX_RUNS = 1 << 20  # of a mask, which bounds the time to a quarter of a second; people's masks have some thousands


@dataclass(frozen=True)
class MarkedPixels:
    """A part of an image and the mask of its marked pixels.

    Args:
        bounds: (top, left, bottom, right) of the part, in pixels of the image, the last two exclusive.
        mask: (h, w) boolean; None where all are marked.
    """

    bounds: tuple[int, int, int, int]
    mask: np.ndarray | None = None

    @classmethod
    def of(cls, mask: np.ndarray, top: int = 0, left: int = 0) -> MarkedPixels | None:
        """The pixels that a boolean mask marks, in the smallest part that holds them; None if it marks none.

        Args:
            top, left: place of the mask's first pixel in the image.
        """
        rows = np.flatnonzero(mask.any(axis=1))
        if not len(rows):
            return None
        mask = mask[rows[0] : rows[-1] + 1]
        cols = np.flatnonzero(mask.any(axis=0))
        mask = mask[:, cols[0] : cols[-1] + 1].copy()  # torch takes none that is flipped or read-only
        top, left = top + int(rows[0]), left + int(cols[0])
        return cls((top, left, top + mask.shape[0], left + mask.shape[1]), mask)

    def drawn(self, image_size: tuple[int, int]) -> np.ndarray:
        """(H, W) boolean mask of the whole image."""
        top, left, bottom, right = self.bounds
        whole = np.zeros(image_size, dtype=bool)
        whole[top:bottom, left:right] = True if self.mask is None else self.mask
        return whole


def mark_box(box: Sequence[float], image_size: tuple[int, int]) -> MarkedPixels:
    """All pixels that a box (x0, y0, x1, y1), which reaches into the image, touches."""
    left, top, right, bottom = box
    height, width = image_size
    rows = max(0, math.floor(top)), min(height, math.ceil(bottom))
    cols = max(0, math.floor(left)), min(width, math.ceil(right))
    return MarkedPixels((rows[0], cols[0], rows[1], cols[1]))


def mark_polygon(outlines: Sequence[np.ndarray], image_size: tuple[int, int]) -> MarkedPixels | None:
    """The pixels whose centre lies inside one of the outlines (K, 2) of x, y; None if none is in the image.

    Outlines too thin to hold a centre mark the pixels of their corners.
    """
    corners = np.concatenate(outlines)
    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
    height, width = image_size
    top, left = max(0, math.floor(y0)), max(0, math.floor(x0))
    bottom, right = min(height, math.ceil(y1)), min(width, math.ceil(x1))
    if top < bottom and left < right:
        mask = np.zeros((bottom - top, right - left), dtype=bool)
        for outline in outlines:
            mask |= _inside(outline, (top, left, bottom, right))
        marked = MarkedPixels.of(mask, top, left)
        if marked is not None:
            return marked
    cols, rows = np.floor(corners).astype(int).T
    shown = (rows >= 0) & (rows < height) & (cols >= 0) & (cols < width)
    if not shown.any():
        return None
    rows, cols = rows[shown], cols[shown]
    mask = np.zeros((np.ptp(rows) + 1, np.ptp(cols) + 1), dtype=bool)
    mask[rows - rows.min(), cols - cols.min()] = True
    return MarkedPixels.of(mask, int(rows.min()), int(cols.min()))


def _inside(outline: np.ndarray, bounds: tuple[int, int, int, int]) -> np.ndarray:
    """(h, w), whether the pixels' centres lie inside an outline (K, 2): left of them an edge was crossed oddly."""
    top, left, bottom, right = bounds
    one, other = outline, np.roll(outline, -1, axis=0)
    downward = (one[:, 1] <= other[:, 1])[:, None]
    (x0, y0), (x1, y1) = np.where(downward, one, other).T, np.where(downward, other, one).T
    # Rows of centres with y0 <= row + 0.5 < y1, so that a corner belongs to one of its two edges.
    first = np.maximum(top, np.ceil(y0 - 0.5)).astype(int)
    crossings = np.maximum(np.minimum(bottom, np.ceil(y1 - 0.5)).astype(int) - first, 0)  # (K,)
    # Where inside and outside change; the last column lies beyond the bounds.
    changes = np.zeros((bottom - top, right - left + 1), dtype=np.uint8)
    step = max(1, EDGES_AT_ONCE // (bottom - top))
    for start in range(0, len(outline), step):
        some = slice(start, start + step)
        edge = np.repeat(np.arange(len(outline))[some], crossings[some])
        row = np.arange(len(edge)) - np.repeat(np.cumsum(crossings[some]) - crossings[some], crossings[some])
        row += first[edge]
        x = x0[edge] + (row + 0.5 - y0[edge]) * ((x1[edge] - x0[edge]) / (y1[edge] - y0[edge]))
        col = np.clip(np.ceil(x - 0.5), left, right).astype(int)
        np.add.at(changes.reshape(-1), (row - top) * changes.shape[1] + col - left, 1)  # modulo 256, which is even
    crossed = torch.from_numpy(changes).cumsum(1, dtype=torch.uint8)  # seven times as fast as NumPy's
    return (crossed & 1).bool().numpy()[:, :-1]


def mark_runs(region: Mapping[str, Any], image_size: tuple[int, int], name: str) -> MarkedPixels | None:
    """The pixels that a COCO RLE marks; None if its runs are all of 0.

    `counts` are the lengths of runs of 0 and 1 in turn, zeros first, column by column, as a list or in COCO's text
    form. They are not trusted: runs are counted before they are read, and added up before a mask is made.

    Raises:
        ValueError: for another size than the image's, counts that are no runs, and runs that do not fill the image.
    """
    height, width = image_size
    size, counts = _as_list(region.get("size")), _as_list(region["counts"])
    is_list = isinstance(size, Sequence) and all(isinstance(side, numbers.Real) for side in size)
    try:
        if not is_list or [*size] != [height, width]:
            raise ValueError(
                f"an RLE of size {' '.join(repr(size).split())[:60]} but its image is {height}x{width}; its size is"
                " [height, width] of the image as shown, after EXIF rotation"
            )
        runs = (_decompress if isinstance(counts, (str, bytes)) else _plain_runs)(counts, height * width)
        ends = np.cumsum(_filling(runs, height, width))  # (K,)
    except ValueError as error:
        raise ValueError(f"{name} is {error}") from None
    of_ones = np.arange(1, len(ends), 2)
    of_ones = of_ones[ends[of_ones] > ends[of_ones - 1]]
    if not len(of_ones):
        return None
    first_col, last_col = ends[of_ones[0] - 1] // height, (ends[of_ones[-1]] - 1) // height
    ends = np.clip(ends, first_col * height, (last_col + 1) * height)
    values = np.arange(len(ends)) % 2 == 1
    columns = np.repeat(values, np.diff(ends, prepend=first_col * height)).reshape(-1, height)
    return MarkedPixels.of(columns.T, left=int(first_col))


def _as_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


def _broken(what: str) -> ValueError:
    return ValueError(f"a broken RLE: {what}; encode it again")


def _filling(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    """The runs (K,), which must fill the image."""
    num_pixels = height * width
    if runs.size and runs.min() < 0:
        raise _broken("a run below 0")
    total = int(runs.sum()) if not runs.size or runs.max() <= num_pixels else num_pixels + 1
    if total != num_pixels:
        told = "more" if total > num_pixels else total
        raise _broken(f"runs that add up to {told}, where {height}x{width} has {num_pixels} pixels")
    return runs


def _check_number(num_runs: int, num_pixels: int) -> None:
    if num_runs > num_pixels + 2:  # of a mask of single pixels the first and the last run may be empty
        raise _broken(f"more runs than pixels, {num_runs} for {num_pixels}")
    if num_runs > MAX_RUNS:
        raise ValueError(f"an RLE of {num_runs} runs; at most {MAX_RUNS} are read: pass a boolean array")


def _plain_runs(counts: Any, num_pixels: int) -> np.ndarray:
    """(K,) of counts that are a list."""
    kinds = set(map(type, counts)) if isinstance(counts, Sequence) else {type(None)}
    if not all(issubclass(kind, numbers.Integral) and kind is not bool for kind in kinds):
        raise _broken("its counts are neither text nor whole numbers")
    _check_number(len(counts), num_pixels)
    return np.array([max(-1, min(count, num_pixels + 1)) for count in counts], dtype=np.int64)


def _decompress(counts: str | bytes, num_pixels: int) -> np.ndarray:
    """(K,) of COCO's text form: six bits a character above "0", of which five count and one says that more follow.

    Numbers are in two's complement, low bits first; from the fourth on, a run is the difference to the one two before.
    """
    text = counts.encode("ascii", "replace") if isinstance(counts, str) else counts
    codes = np.frombuffer(text, np.uint8) - np.uint8(48)  # (n,); what lies below "0" becomes too large
    last = np.flatnonzero(codes & 32 == 0)  # (K,) where numbers end
    _check_number(len(last), num_pixels)
    starts = np.concatenate([[0], last + 1])  # (K + 1,), behind the last number, too
    lengths = np.diff(starts, append=len(codes))
    wrong = [*np.flatnonzero(codes >= 64)[:1], *(starts[lengths > MAX_CHARACTERS][:1] + MAX_CHARACTERS)]
    if wrong:
        raise _broken(f"character {min(wrong) + 1} of its counts cannot stand there")
    if lengths[-1]:
        raise _broken("its counts end within a number")
    starts, lengths = starts[:-1], lengths[:-1]
    places = np.arange(len(codes)) - np.repeat(starts, lengths)  # (n,) of a character in its number
    digits = (codes & 31).astype(np.int64) << (5 * places)
    values = np.add.reduceat(digits, starts) if len(starts) else np.zeros(0, np.int64)  # (K,)
    values -= np.where(codes[last] & 16, np.int64(1) << (5 * lengths), 0)
    if values.size and np.abs(values).max() > num_pixels:
        raise _broken(f"runs that add up to more than {num_pixels} pixels")
    for chain in (values[1::2], values[2::2]):
        np.cumsum(chain, out=chain)
    return values
