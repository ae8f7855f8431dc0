"""The pixels that a region marks, and which those are for boxes and polygons.

A region is small beside its image: only the part that it lies in is ever drawn, and of a box not even that.

Shapes: H, W an image, h, w the part of it that a region lies in, K corners of an outline.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

EDGES_AT_ONCE = 1 << 20  # rows of pixels that edges cross at a time; bounds the memory, whatever the polygon


@dataclass(frozen=True)
class MarkedPixels:
    """Those of a mask that covers a part of an image, or all pixels of that part.

    Args:
        bounds: (top, left, bottom, right) of the part, in pixels of the image, the last two exclusive.
        mask: (h, w) boolean; None where all are marked.
    """

    bounds: tuple[int, int, int, int]
    mask: np.ndarray | None = None

    @classmethod
    def of(cls, mask: np.ndarray, top: int = 0, left: int = 0) -> MarkedPixels | None:
        """What a boolean mask marks, cut down to that; None where it marks nothing.

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
    """The pixels whose centre lies inside one of some outlines (K, 2) of x, y; None where none is in the image.

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
