"""Turns the shapes of annotations into region specs: `{"polygon": ...}`, `{"rle": ...}` or `{"box": ...}`.

Only what is cheap is checked. Whether a polygon has an area, or an RLE fills its image, shows when the region is drawn,
by `tokenpacker data check` or in training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tokenpacker.data.rows import Kind, RecordError

DIGITS = 2  # of a coordinate: a hundredth of a pixel
KIND: Kind = "malformed region"
Spec = dict[str, Any]
Size = tuple[int, int]  # (height, width)


def segmentation_spec(id: str, annotation: Mapping[str, Any], size: Size | None = None) -> Spec:
    """The region of a COCO annotation: its `segmentation`, or its `bbox` if that is empty.

    Args:
        size: of the image, which an RLE must have.

    Raises:
        RecordError: for another form, and if there is neither.
    """
    shape = annotation.get("segmentation")
    if isinstance(shape, Mapping):
        return _rle_spec(id, shape, size)
    if isinstance(shape, (list, tuple)) and shape:
        parts = [shape] if not isinstance(shape[0], (list, tuple)) else shape
        spec = polygon_spec(id, parts)
        if spec is not None:
            return spec
    elif shape not in (None, [], ()):
        raise RecordError(id, f"segmentation is a {type(shape).__name__}; a list of polygons or an RLE is due", KIND)
    box = annotation.get("bbox")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not _are_numbers(box):
        raise RecordError(id, "it has neither a polygon of three points, an RLE nor a bbox [x, y, width, height]", KIND)
    x, y, width, height = box
    return box_spec(id, (x, y, x + width, y + height))


def polygon_spec(id: str, parts: Sequence[Any]) -> Spec | None:
    """The region of a list of polygons [x0, y0, x1, y1, ...]; None when none of them has three points."""
    kept = []
    for part in parts:
        if not isinstance(part, (list, tuple)) or len(part) % 2 or not _are_numbers(part):
            raise RecordError(id, "a polygon is no list of x and y in turn", KIND)
        if len(part) >= 6:  # fewer enclose nothing
            kept.append([_rounded(number) for number in part])
    return {"polygon": kept} if kept else None


def box_spec(id: str, box: Sequence[float]) -> Spec:
    """The region of a box (x0, y0, x1, y1). Raises RecordError for one without an area."""
    if len(box) != 4 or not _are_numbers(box) or box[2] <= box[0] or box[3] <= box[1]:
        raise RecordError(id, f"box {list(box)} (x0, y0, x1, y1) has no area", KIND)
    return {"box": [_rounded(number) for number in box]}


def mask_spec(mask: np.ndarray) -> Spec:
    """The region of a mask (H, W), as COCO's uncompressed RLE: lengths of runs down the columns, zeros first."""
    flat = np.asarray(mask, dtype=bool).ravel(order="F")
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], edges, [flat.size]))).tolist()
    counts = [0, *runs] if flat.size and flat[0] else runs
    return {"rle": {"counts": counts, "size": list(mask.shape)}}


def _rle_spec(id: str, rle: Mapping[str, Any], size: Size | None) -> Spec:
    counts, given = rle.get("counts"), rle.get("size")
    if not isinstance(counts, (str, list)) or not isinstance(given, (list, tuple)) or len(given) != 2:
        raise RecordError(id, "an RLE needs 'counts' and 'size' [height, width]", KIND)
    if size is not None and tuple(given) != size:
        reason = f"an RLE has size {given[0]}x{given[1]} in an image of {size[0]}x{size[1]}; it belongs to another"
        raise RecordError(id, reason, KIND)
    return {"rle": {"counts": counts, "size": list(given)}}


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(type(value) in (int, float) and math.isfinite(value) for value in values)


def _rounded(number: float) -> float:
    return number if isinstance(number, int) else round(number, DIGITS)
