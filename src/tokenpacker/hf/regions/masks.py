"""Reads a region in any form that users give it: array, picture, COCO RLE, polygon, box.

Coordinates are those of the image as shown, after EXIF rotation, x to the right and y down, (0, 0) the upper left
corner of its first pixel. What lies beyond the image is cut off. Coordinates that all lie within 0..1 are refused: they
are shares of the sides, not pixels. Which pixels a form marks:

- an array (H, W): those that are true, or not 0;
- a picture of black and at most one other colour, transparent nowhere: those that are not black;
- a COCO RLE: what its runs say, column by column;
- a box (x0, y0, x1, y1): all that it touches;
- a polygon: those whose centre lies inside, by the even-odd rule, so that a self-crossing outline has holes where it
  winds twice; several parts are joined. One so thin that it holds no centre marks the pixels of its corners.

A mask may be a file's path. Servers that pass on what strangers send switch that off with `images.no_files`.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from tokenpacker.hf.regions.marked_pixels import MarkedPixels, mark_box, mark_polygon, mark_runs
from tokenpacker.images import ImageError, open_image, upright

REGION_FORMS = ("box", "polygon", "rle", "mask")  # keys of a region that is written as a dict
FORMS = "a (H, W) boolean array, a COCO RLE, a polygon [[x, y, x, y, x, y, ...]] or a box (x0, y0, x1, y1)"
GREY_MODES = ("1", "L")
COLOUR_MODES = ("P", "RGB", "LA", "PA", "RGBA")
COLOURS_COUNTED = 256
COLOURS_TOLD = 4
MAX_COORDINATE = 1e7  # beyond every image
SHARE_TOLERANCE = 0.01  # by which shares of a side, as some detectors give them, may miss 0 and 1
CHANNELS = {1: "mask[..., 0]", 3: "mask.any(-1)", 4: "mask[..., :3].any(-1)"}  # last side of a picture: its mask
TWO_COLOURS = "pass a boolean array of what is meant, or save it as a PNG of two colours"
NESTED_LISTS = "nested lists of 0 and 1; pass an array, np.array(mask, dtype=bool)"


def split_regions(entry: Any) -> list[Any]:
    """The regions of one image as a list, not yet read; empty for None.

    Args:
        entry: a list of regions, (R, H, W) masks, (R, 4) boxes, or a lone region.

    Raises:
        ValueError: for what is no list of regions, and arrays (H, W, 1 or 3 or 4), which may be a picture or H masks.
    """
    if entry is None:
        return []
    if is_lone_region(entry):
        return _split_array(entry)
    if not isinstance(entry, Sequence):
        raise ValueError(f"regions are given as {type(entry).__name__}; pass a list with one entry for each region")
    if _are_rows_of_pixels(entry) and len(entry[0]) > 4:  # four would be boxes
        raise ValueError(f"regions are given as {NESTED_LISTS}")
    return [part for region in entry for part in _split_array(region)]


def is_lone_region(value: Any) -> bool:
    """Whether the type is that of a region, or of an array of several, and not of a list of regions."""
    lone = (np.ndarray, Tensor, Mapping, Image.Image, str, Path)
    return isinstance(value, lone) or (_is_flat(value) and len(value) > 0)


def _split_array(region: Any) -> list[Any]:
    """The masks of (R, H, W), the boxes of (R, 4), or the region itself."""
    array = _to_numpy(region)
    if not isinstance(array, np.ndarray):
        return [region]
    if array.ndim == 3 and array.shape[2] in CHANNELS:
        height, width, channels = array.shape
        raise ValueError(
            f"a mask is an array of {_shape(array)}, a picture of {height}x{width} in {channels} channels or {height}"
            f" masks of {width}x{channels}; pass {CHANNELS[channels]} for a picture, list(mask) for masks"
        )
    # A mask of four columns is boolean or holds nothing but 0 and 1; boxes do not.
    whole_numbers = array.dtype.kind in "iu" and not np.isin(array, (0, 1)).all()
    boxes = array.ndim == 2 and array.shape[1] == 4 and (array.dtype.kind == "f" or whole_numbers)
    return list(array) if array.ndim == 3 or boxes else [array]


def to_mask(region: Any, image_size: tuple[int, int], name: str = "the region") -> np.ndarray:
    """(H, W) boolean mask of a region in an image of (height, width). Arguments and errors as `mark_region`."""
    return mark_region(region, image_size, name).drawn(image_size)


def mark_region(region: Any, image_size: tuple[int, int], name: str = "the region") -> MarkedPixels:
    """The pixels that a region marks in an image of (height, width), at least one.

    Args:
        name: opens the messages of errors.

    Raises:
        ValueError: for a form that is unknown or contradicts itself, a mask of another size or without any pixel, and
            a region that lies outside of the image.
    """
    form = _form_of(region)
    if isinstance(region, Mapping) and form is None:
        known = [key for key in REGION_FORMS if key in region]
        if len(known) != 1 or len(region) != 1:
            raise ValueError(f"{name} has the keys {sorted(map(str, region))}; write one of {', '.join(REGION_FORMS)}")
        form, region = known[0], region[known[0]]
        if form == "polygon" and isinstance(region, (np.ndarray, Tensor)):
            region = region.tolist()
        if _form_of(region) != form:
            raise ValueError(f"{name} has {form}={str(region)[:60]}, which is none; use {FORMS}")
    if form == "box":
        return _from_box(region, image_size, name)
    if form == "polygon":
        return _from_polygon(region, image_size, name)
    if form == "rle":
        marked = mark_runs(region, image_size, name)
    elif form == "mask":
        marked = MarkedPixels.of(_from_array(region, image_size, name))
    else:
        raise ValueError(f"{name} is given as {type(region).__name__}; use {FORMS}")
    if marked is None:
        raise ValueError(f"{name} has no pixel set; mark at least one, or leave the region out")
    return marked


def _form_of(region: Any) -> str | None:
    """Which of `REGION_FORMS` a region is, by its type; None for another one."""
    if isinstance(region, Mapping):
        return "rle" if "counts" in region else None
    if isinstance(region, (np.ndarray, Tensor)):
        return "mask" if region.ndim != 1 else _form_of(region.tolist())
    if isinstance(region, (Image.Image, str, Path)):
        return "mask"
    if _is_flat(region) and len(region) == 4:
        return "box"
    return "polygon" if isinstance(region, Sequence) else None


def read_mask(source: str | Path) -> np.ndarray:
    """(H, W) boolean mask of a picture of black and one other colour, which is marked.

    Raises:
        ImageError: for a file that is not there or cannot be read, and a picture of other colours.
    """
    try:
        with open_image(source) as (name, picture):
            picture.load()
    except ImageError as error:
        raise ImageError(f"mask {error}") from error
    except Exception as error:  # decoders fail in many ways
        reason = " ".join(str(error).split())[:120]
        raise ImageError(f"mask {source} cannot be read ({reason}); give a black-and-white PNG file") from error
    return _from_picture(picture, name)


def _from_picture(picture: Image.Image, name: str) -> np.ndarray:
    """(H, W), upright as its image will be; colours are compared as they are shown, not by their place in a palette."""
    picture = upright(picture)
    kind, black = ("grey levels", 0) if picture.mode in GREY_MODES else ("colours", (0, 0, 0))
    if picture.mode not in (*GREY_MODES, *COLOUR_MODES):
        raise ImageError(
            f"{name} is a picture of mode {picture.mode}; a mask is black and one other colour in 8 bits: save it as"
            " a black-and-white PNG file"
        )
    if picture.has_transparency_data and any(picture.convert("RGBA").getchannel("A").histogram()[:255]):
        raise ImageError(f"{name} is transparent in places; a mask is black where nothing is marked: fill it in")
    picture = picture if picture.mode in GREY_MODES else picture.convert("RGB")
    counted = picture.getcolors(COLOURS_COUNTED)
    if counted is None:
        raise ImageError(
            f"{name} holds more than {COLOURS_COUNTED} colours; a mask has black and one other: {TWO_COLOURS}"
        )
    used: list[Any] = sorted(colour for _, colour in counted)
    if len(used) > 2 or (len(used) == 2 and black not in used):
        told = ", ".join(map(str, used[:COLOURS_TOLD])) + (", ..." if len(used) > COLOURS_TOLD else "")
        raise ImageError(f"{name} holds {len(used)} {kind}, {told}; a mask has {black} and one other: {TWO_COLOURS}")
    pixels = np.asarray(picture) != 0
    return pixels if pixels.ndim == 2 else pixels.any(axis=2)


def _from_array(region: Any, image_size: tuple[int, int], name: str) -> np.ndarray:
    if isinstance(region, Image.Image):
        mask = _from_picture(region, name)
    elif isinstance(region, (str, Path)):
        mask = read_mask(region)
    else:
        array = _to_numpy(region)
        if array.ndim == 3 and array.shape[2] in CHANNELS:
            raise ValueError(f"{name} is an array of {_shape(array)}; masks are (H, W): {CHANNELS[array.shape[2]]}")
        if array.dtype.kind not in "biu":
            raise ValueError(f"{name} is an array of {array.dtype}; pass booleans, for example mask > 0.5")
        if array.size and (array.min() < 0 or array.max() > 1):
            raise ValueError(
                f"{name} holds values from {array.min()} to {array.max()}; pass 0 and 1, or booleans: mask != 0"
            )
        mask = array.astype(bool, copy=False)
    if mask.shape != tuple(image_size):
        raise ValueError(
            f"{name} is {_shape(mask)} but its image is {image_size[0]}x{image_size[1]}; masks have the size (height,"
            " width) of the image as shown, after EXIF rotation"
        )
    return mask


def _from_box(box: Sequence[float], image_size: tuple[int, int], name: str) -> MarkedPixels:
    [[left, top], [right, bottom]] = corners = _points(box, name)
    if right <= left or bottom <= top:
        raise ValueError(
            f"{name} is the box {_told(box)}; give (x0, y0, x1, y1) with x1 > x0 and y1 > y0: (x, y, width, height), as"
            " COCO writes it, is (x, y, x + width, y + height) here"
        )
    _check_place(corners, image_size, name)
    return mark_box((left, top, right, bottom), image_size)


def _from_polygon(region: Sequence[Any], image_size: tuple[int, int], name: str) -> MarkedPixels:
    if _are_rows_of_pixels(region):
        raise ValueError(f"{name} is given as {NESTED_LISTS}")
    if not len(region):
        raise ValueError(f"{name} is an empty list; use {FORMS}")
    one_part = _is_flat(region)
    if one_part and len(region) < 4:
        raise ValueError(f"{name} is given as numbers, {_told(region)}; use {FORMS}")
    outlines = []
    for part in [region] if one_part else region:
        flat = _is_flat(part)
        if not flat or len(part) < 6 or len(part) % 2:
            told = f"{len(part)} numbers" if flat else " ".join(str(part).split())[:40]
            too_deep = len(part) == 4 if flat else is_lone_region(part)
            hint = "; region_masks has one list per image, not per prompt" if too_deep else ""
            raise ValueError(
                f"{name} has a polygon of {told}; write at least three points as [x, y, x, y, x, y, ...]{hint}"
            )
        outlines.append(_points(part, name))
    _check_place(np.concatenate(outlines), image_size, name)
    marked = mark_polygon(outlines, image_size)
    if marked is None:
        raise ValueError(f"{name} is a polygon without a pixel in its image; its points are x, y in image pixels")
    return marked


def _points(coordinates: Sequence[float], name: str) -> np.ndarray:
    """(K, 2) of x, y, x, y, ...; raises ValueError for numbers that no image has."""
    points = np.array([float(value) for value in coordinates])
    wrong = points[~(abs(points) <= MAX_COORDINATE)]  # NaN, too
    if len(wrong):
        raise ValueError(f"{name} has the coordinate {wrong[0]:g}; give x, y in pixels of the image as shown")
    return points.reshape(-1, 2)


def _check_place(points: np.ndarray, image_size: tuple[int, int], name: str) -> None:
    """Raises ValueError for shares of the image's sides, which would mark its first pixel, and for a place outside."""
    height, width = image_size
    if height * width > 1 and ((points >= -SHARE_TOLERANCE) & (points <= 1 + SHARE_TOLERANCE)).all():
        shown = _told(points.flatten()[:4]).replace(")", ", ...)" if len(points) > 2 else ")")
        raise ValueError(
            f"{name} has all coordinates between 0 and 1, {shown}; give pixels: multiply x by the width {width} and y"
            f" by the height {height} (for the first pixel itself, pass a mask)"
        )
    first, last = points.min(axis=0), points.max(axis=0)
    if (last <= 0).any() or (first >= (width, height)).any():
        raise ValueError(
            f"{name} reaches from {_told(first)} to {_told(last)}, outside of its image of {width} x {height} (width x"
            " height); give x, y in pixels of the image as shown"
        )


def _to_numpy(array: Any) -> Any:
    """A tensor as an array; anything else as it is."""
    if not isinstance(array, Tensor):
        return array
    array = array.detach().cpu()
    return (array.float() if array.is_floating_point() else array).numpy()  # NumPy knows no bfloat16


def _shape(array: np.ndarray) -> str:
    return "x".join(map(str, array.shape)) or "a single number"


def _is_flat(value: Any) -> bool:
    """Whether this is a sequence of plain numbers."""
    value = _to_numpy(value)
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iuf"
    is_list = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    return is_list and all(_is_number(entry) for entry in value)


def _is_number(value: Any) -> bool:
    if isinstance(value, (np.ndarray, Tensor)):  # as in tuple(tensor)
        value = value.item() if value.ndim == 0 else None
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _are_rows_of_pixels(value: Sequence[Any]) -> bool:
    """Whether this is a mask as nested lists: two rows or more of one length, of nothing but 0 and 1."""
    rows = [row for row in value if isinstance(row, (list, tuple))]
    if not 1 < len(rows) == len(value) or len({len(row) for row in rows}) > 1:
        return False
    return all(isinstance(pixel, (numbers.Real, np.bool_)) and pixel in (0, 1) for row in rows for pixel in row)


def _told(values: Sequence[float] | np.ndarray) -> str:
    return "(" + ", ".join(f"{float(value):g}" for value in values) + ")"
