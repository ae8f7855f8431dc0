"""Whatever users mark a region with, to a mask of the image's pixels: arrays, pictures, COCO RLE, polygons, boxes.

Coordinates are those of the original image, upright, x to the right and y down, (0, 0) the upper left corner of its
first pixel; what reaches beyond the image is cut off. Which pixels a form marks:

- an array (H, W): those that are true, or not 0;
- a COCO RLE: what its runs say, column by column;
- a box (x0, y0, x1, y1): all that it touches;
- a polygon: those whose centre lies inside, by the even-odd rule, so that a self-crossing outline has holes where it
  winds twice; several parts are joined. One so thin that it holds no centre marks the pixels of its corners.

Nothing here trusts its input: runs are added up before a mask is made, and the mask is never larger than the image.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tokenpacker.images import ImageError

REGION_FORMS = ("box", "polygon", "rle", "mask")  # keys of a region that is written as a dict
FORMS = "a (H, W) boolean array, a COCO RLE, a polygon [[x, y, x, y, x, y, ...]] or a box (x0, y0, x1, y1)"
MASK_MODES = ("1", "L")  # of pictures: black and white, grey
MAX_COORDINATE = 1e7  # beyond every image
MAX_RUN_BITS = 40  # of one number in a compressed RLE; no image has runs as long


def split_regions(entry: Any) -> list[Any]:
    """The regions of one image, each by itself, still in its own form; none for None.

    Args:
        entry: a list of regions, a (R, H, W) array, or a lone region.
    """
    if entry is None:
        return []
    if isinstance(entry, (np.ndarray, Tensor)):
        return list(entry) if entry.ndim == 3 else [entry]
    if isinstance(entry, (Mapping, Image.Image, str, Path)) or (_is_flat(entry) and len(entry)):
        return [entry]
    if not isinstance(entry, Sequence):
        raise ValueError(f"regions are given as {type(entry).__name__}; pass a list with one entry for each region")
    stacks = [isinstance(region, (np.ndarray, Tensor)) and region.ndim == 3 for region in entry]
    return [part for region, stack in zip(entry, stacks, strict=True) for part in (region if stack else [region])]


def to_mask(region: Any, image_size: tuple[int, int], name: str = "the region") -> np.ndarray:
    """(H, W) boolean mask of a region in an image of that size; at least one pixel is set.

    Args:
        name: opens the messages of errors.

    Raises:
        ValueError: for a form that is unknown or contradicts itself, a mask of another size or without any pixel, and
            a region that lies outside of the image.
    """
    if isinstance(region, (np.ndarray, Tensor)) and region.ndim == 1:  # a box or a polygon
        region = region.tolist()
    if isinstance(region, Mapping) and "counts" not in region:
        known = [key for key in REGION_FORMS if key in region]
        if len(known) != 1 or len(region) != 1:
            raise ValueError(f"{name} has the keys {sorted(map(str, region))}; write one of {', '.join(REGION_FORMS)}")
        region = _checked_form(known[0], region[known[0]], name)
    if isinstance(region, Mapping):
        mask = _from_rle(region, image_size, name)
    elif isinstance(region, (np.ndarray, Tensor, Image.Image, str, Path)):
        mask = _from_array(region, image_size, name)
    elif _is_flat(region) and len(region) == 4:
        return _from_box(region, image_size, name)
    elif isinstance(region, Sequence):
        return _from_polygon(region, image_size, name)
    else:
        raise ValueError(f"{name} is given as {type(region).__name__}; use {FORMS}")
    if not mask.any():
        raise ValueError(f"{name} has no pixel set; mark at least one, or leave the region out")
    return mask


def read_mask(source: str | Path) -> np.ndarray:
    """(H, W) boolean mask of a black-and-white picture; what is not black is marked.

    Raises:
        ImageError: for a file that is not there or cannot be read, and a picture of more than two grey levels.
    """
    try:
        with Image.open(source) as picture:
            return _from_picture(picture, str(source))
    except FileNotFoundError:
        raise ImageError(f"mask {source} does not exist; check the path") from None
    except ImageError:
        raise
    except Exception as error:  # decoders fail in many ways
        reason = " ".join(str(error).split())[:120]
        raise ImageError(f"mask {source} cannot be read ({reason}); give a black-and-white PNG file") from error


def _from_picture(picture: Image.Image, name: str) -> np.ndarray:
    if picture.mode not in MASK_MODES:
        raise ImageError(
            f"{name} is a picture of mode {picture.mode}; a mask is black and white: use mode 1 or L, for example"
            " mask.convert('L')"
        )
    levels = [level for level, count in enumerate(picture.histogram()) if count]
    if len(levels) > 2 or (len(levels) == 2 and levels[0] != 0):
        raise ImageError(
            f"{name} holds {len(levels)} grey levels from {levels[0]} to {levels[-1]}; a mask has 0 and one other"
        )
    return np.asarray(picture) != 0


def _from_array(region: Any, image_size: tuple[int, int], name: str) -> np.ndarray:
    if isinstance(region, Image.Image):
        mask = _from_picture(region, name)
    elif isinstance(region, (str, Path)):
        mask = read_mask(region)
    else:
        array = _to_numpy(region) if isinstance(region, Tensor) else region
        if array.dtype != np.bool_ and array.dtype.kind not in "iu":
            raise ValueError(f"{name} is an array of {array.dtype}; pass booleans, for example mask > 0.5")
        if array.dtype != np.bool_ and array.size and (array.min() < 0 or array.max() > 1):
            raise ValueError(
                f"{name} holds values from {array.min()} to {array.max()}; pass 0 and 1, or booleans: mask != 0"
            )
        mask = array.astype(bool, copy=False)
    if mask.shape != tuple(image_size):
        shape = "x".join(map(str, mask.shape)) or "a single number"
        raise ValueError(
            f"{name} is {shape} but its image is {image_size[0]}x{image_size[1]}; masks have the size (height, width)"
            " of the original image"
        )
    return mask


def _to_numpy(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # NumPy knows no bfloat16


def _from_rle(region: Mapping[str, Any], image_size: tuple[int, int], name: str) -> np.ndarray:
    height, width = image_size
    size, counts = region.get("size"), region["counts"]
    if not isinstance(size, (Sequence, np.ndarray)) or [*size] != [height, width]:
        raise ValueError(
            f"{name} is an RLE of size {size!r} but its image is {height}x{width}; its size is [height, width] of the"
            " original image"
        )
    runs = _decompress(counts, name) if isinstance(counts, (str, bytes)) else _plain_runs(counts, name)
    if min(runs, default=0) < 0 or sum(runs) != height * width:
        wrong = "a run below 0" if min(runs, default=0) < 0 else f"runs of {sum(runs)} pixels in all"
        raise ValueError(
            f"{name} is a broken RLE: {wrong}, where {height}x{width} has {height * width}; encode it again"
        )
    values = np.arange(len(runs)) % 2 == 1  # runs of 0 and 1 in turn
    return np.repeat(values, runs).reshape(width, height).T


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


def _from_box(box: Sequence[float], image_size: tuple[int, int], name: str) -> np.ndarray:
    left, top, right, bottom = _finite(box, name)
    if right <= left or bottom <= top:
        raise ValueError(f"{name} is the box {_told(box)}; give (x0, y0, x1, y1) with x1 > x0 and y1 > y0")
    height, width = image_size
    _check_inside(left, top, right, bottom, image_size, name)
    mask = np.zeros(image_size, dtype=bool)
    rows = slice(max(0, math.floor(top)), min(height, math.ceil(bottom)))
    mask[rows, max(0, math.floor(left)) : min(width, math.ceil(right))] = True
    return mask


def _from_polygon(region: Sequence[Any], image_size: tuple[int, int], name: str) -> np.ndarray:
    parts = [region] if _is_flat(region) and len(region) else region
    mask = np.zeros(image_size, dtype=bool)
    corners = []
    for part in parts:
        if not _is_flat(part) or len(part) < 6 or len(part) % 2:
            told = f"{len(part)} numbers" if _is_flat(part) else f"{str(part)[:40]}"
            raise ValueError(f"{name} has a polygon of {told}; write at least three points as [x, y, x, y, x, y, ...]")
        points = np.array(_finite(part, name)).reshape(-1, 2)
        corners.append(points)
        _fill(mask, points)
    if not corners:
        raise ValueError(f"{name} is an empty list; use {FORMS}")
    every = np.concatenate(corners)
    (left, top), (right, bottom) = every.min(axis=0), every.max(axis=0)
    _check_inside(left, top, right, bottom, image_size, name)
    if not mask.any():
        cols, rows = np.floor(every).astype(int).T
        shown = (rows >= 0) & (rows < image_size[0]) & (cols >= 0) & (cols < image_size[1])
        mask[rows[shown], cols[shown]] = True
    if not mask.any():
        raise ValueError(f"{name} is a polygon without a pixel in its image; its points are x, y in image pixels")
    return mask


def _fill(mask: np.ndarray, points: np.ndarray) -> None:
    """Marks the pixels whose centre lies inside an outline (K, 2) of x, y: left of it an edge was crossed oddly."""
    height, width = mask.shape
    left, top = np.clip(np.floor(points.min(axis=0)), 0, (width, height)).astype(int)
    right, bottom = np.clip(np.ceil(points.max(axis=0)), 0, (width, height)).astype(int)
    # Where inside and outside change, within the outline's bounds; the last column lies beyond them.
    crossed = np.zeros((bottom - top, right - left + 1), dtype=bool)
    for (x0, y0), (x1, y1) in zip(points, np.roll(points, -1, axis=0), strict=True):
        if y0 > y1:
            x0, y0, x1, y1 = x1, y1, x0, y0
        # Centres with y0 <= row + 0.5 < y1, so that a corner belongs to one of its two edges.
        rows = np.arange(max(top, math.ceil(y0 - 0.5)), min(bottom, math.ceil(y1 - 0.5)))
        if rows.size:
            places = x0 + (rows + 0.5 - y0) * ((x1 - x0) / (y1 - y0))
            cols = np.clip(np.ceil(places - 0.5), left, right).astype(int)
            crossed[rows - top, cols - left] ^= True
    mask[top:bottom, left:right] |= np.logical_xor.accumulate(crossed, axis=1)[:, :-1]


def _check_inside(left: float, top: float, right: float, bottom: float, image_size: tuple[int, int], name: str) -> None:
    height, width = image_size
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(
            f"{name} reaches from {_told((left, top))} to {_told((right, bottom))}, outside of its image of"
            f" {width} x {height} (width x height); give x, y in pixels of the original image"
        )


def _checked_form(form: str, value: Any, name: str) -> Any:
    """The value below a key that says what it is."""
    fits = {
        "box": _is_flat(value) and len(value) == 4,
        "polygon": isinstance(value, Sequence) and not (_is_flat(value) and 0 < len(value) <= 4),
        "rle": isinstance(value, Mapping) and "counts" in value,
        "mask": isinstance(value, (np.ndarray, Tensor, Image.Image, str, Path)),
    }
    if not fits[form]:
        raise ValueError(f"{name} has {form}={str(value)[:60]}, which is none; use {FORMS}")
    return value


def _is_flat(value: Any) -> bool:
    """Whether this is a sequence of plain numbers."""
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iuf"
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and all(isinstance(entry, numbers.Real) and not isinstance(entry, bool) for entry in value)


def _finite(values: Sequence[float], name: str) -> list[float]:
    coordinates = [float(value) for value in values]
    wrong = [value for value in coordinates if not abs(value) <= MAX_COORDINATE]
    if wrong:
        raise ValueError(f"{name} has the coordinate {wrong[0]:g}; give x, y in pixels of the original image")
    return coordinates


def _told(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{float(value):g}" for value in values) + ")"
