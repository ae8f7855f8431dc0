"""Labels of every patch of every tile, which the encoder is pre-trained to predict from pixels.

The carried language model reads the same labels in place of images before it sees any (`carried.described`).

Shapes: N tiles, (h, w) patch grid, K label heads.
"""

import bisect
import math
import string

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenpacker.scenes.fine_print import WORDS
from tokenpacker.scenes.scene import COLORS, KINDS, SHAPES, Box, Item, Scene, glyph_edges
from tokenpacker.tiling import TileGrid, TileView, slice_views

DIGITS = tuple("0123456789")
GLYPHS = tuple(string.ascii_lowercase + string.digits)
HEADS: dict[str, tuple[str, ...]] = {  # class 0 of every head is "none of these"
    "kind": KINDS,
    "word": WORDS,
    "tens": DIGITS,
    "ones": DIGITS,
    "color": COLORS,
    "frame": COLORS,
    "shape": SHAPES,
    "above": SHAPES,
    "anchor": KINDS,  # the patch at the centre of an object: one per object, so that objects can be counted
    "left": GLYPHS,  # the character in the left half of a patch, and in the right half: letters help to learn words
    "right": GLYPHS,
}
ATTRIBUTE_HEADS = tuple(HEADS)[:9]  # those that describe an image: all but single letters
NUM_CLASSES = {head: 1 + len(classes) for head, classes in HEADS.items()}
HEAD_INDEX = {head: index for index, head in enumerate(HEADS)}
UNKNOWN = -1  # too little of the object is visible to tell; the loss ignores it

MIN_PATCH_OVERLAP = 0.3  # share of a patch's height, and of its width, that an object's box must cover
RECOGNISABLE = 0.45  # visible share of an object from which its name is the label
GONE = 0.2  # visible share of an object up to which it is labelled as absent
UNREADABLE_SCALE = 1.6  # image pixels per tile pixel from which text of this size cannot be read

Labels = npt.NDArray[np.int64]


def label_tiles(scene: Scene, grid: TileGrid, tile_size: tuple[int, int], patch_size: int) -> Tensor:
    """(N, K, h, w) class indices for the tiles that `make_tiles` cuts from the picture; UNKNOWN where unclear."""
    views = slice_views((scene.height, scene.width), grid, tile_size)
    patch_grid = (tile_size[0] // patch_size, tile_size[1] // patch_size)
    labels = np.zeros((len(views), len(HEADS), *patch_grid), dtype=np.int64)
    for tile, view in enumerate(views):
        for item in scene.items:
            _label_item(labels[tile], item, scene, view, tile_size, patch_size)
    return torch.from_numpy(labels)


def _label_item(
    labels: Labels, item: Item, scene: Scene, view: TileView, tile_size: tuple[int, int], patch_size: int
) -> None:
    """Writes the labels of one object into those of one tile (K, h, w)."""
    outer, box = _to_tile(item.outer_box, view), _to_tile(item.box, view)
    if _visible_share(outer, tile_size) == 0:
        return
    num_rows, num_columns = labels.shape[1:]
    rows = _covered(outer[1], outer[3], patch_size, num_rows)
    columns = _covered(outer[0], outer[2], patch_size, num_columns)
    visible = _visible_share(box, tile_size)
    values = {"kind": _class("kind", item.kind)}
    values["color"] = UNKNOWN if visible < GONE else _class("color", item.color)
    if item.frame is not None:
        values["frame"] = _class("frame", item.frame)
    if item.kind == "shape":
        values["shape"] = _seen("shape", item.text, visible)
    else:
        values |= _text_values(item, box, view, tile_size)
    if item.above is not None:
        mark = next(other for other in scene.items if _is_just_above(other, item))
        values["above"] = _seen("above", item.above, _visible_share(_to_tile(mark.box, view), tile_size))
    for head, value in values.items():
        labels[HEAD_INDEX[head], rows, columns] = value
    if view.scale[0] >= UNREADABLE_SCALE:
        return
    if item.kind != "shape":
        _label_glyphs(labels[:, rows, columns], item, box, columns.start, patch_size)
    row, column = int((box[1] + box[3]) / 2 // patch_size), int((box[0] + box[2]) / 2 // patch_size)
    if 0 <= row < num_rows and 0 <= column < num_columns:
        labels[HEAD_INDEX["anchor"], row, column] = _class("anchor", item.kind)


def _label_glyphs(labels: Labels, item: Item, box: Box, first_column: int, patch_size: int) -> None:
    """Writes the characters at 1/4 and 3/4 of each patch's width into the labels of a text's patches."""
    edges = glyph_edges(item.text, item.font_size)
    stretch = (box[2] - box[0]) / edges[-1]
    boundaries = [box[0] + edge * stretch for edge in edges]
    classes = [0, *(_class("left", glyph) for glyph in item.text), 0]
    for head, place in (("left", 0.25), ("right", 0.75)):
        for column in range(labels.shape[2]):
            middle = (first_column + column + place) * patch_size
            labels[HEAD_INDEX[head], :, column] = classes[bisect.bisect_left(boundaries, middle)]


def _text_values(item: Item, box: Box, view: TileView, tile_size: tuple[int, int]) -> dict[str, int]:
    """Labels of a word or a number, as far as it can be read in this tile."""
    heads = ("word",) if item.kind == "word" else ("tens", "ones")
    if view.scale[0] >= UNREADABLE_SCALE:
        return dict.fromkeys(heads, UNKNOWN)
    left, top, right, bottom = box
    if item.kind == "word":
        return {"word": _class("word", item.text) if _visible_share(box, tile_size) >= RECOGNISABLE else UNKNOWN}
    middle = (left + right) / 2
    halves = ((left, top, middle, bottom), (middle, top, right, bottom))
    return {
        head: _seen(head, digit, _visible_share(half, tile_size))
        for head, digit, half in zip(heads, item.text, halves, strict=True)
    }


def _seen(head: str, name: str, visible: float) -> int:
    if visible >= RECOGNISABLE:
        return _class(head, name)
    return UNKNOWN if visible > GONE else 0


def _class(head: str, name: str) -> int:
    return 1 + HEADS[head].index(name)


def _is_just_above(mark: Item, text: Item) -> bool:
    """Whether this is the shape just above the text; crowded scenes may hold several shapes of a kind."""
    gap = text.box[1] - mark.box[3]
    shared_width = min(mark.box[2], text.box[2]) - max(mark.box[0], text.box[0])
    return mark.kind == "shape" and mark.text == text.above and 0 <= gap <= 8 and shared_width > 0


def _to_tile(box: Box, view: TileView) -> Box:
    """A box of the picture in the pixels of a tile."""
    left, top, right, bottom = box
    (scale_y, scale_x), (offset_y, offset_x) = view.scale, view.offset
    return (
        (left - offset_x) / scale_x,
        (top - offset_y) / scale_y,
        (right - offset_x) / scale_x,
        (bottom - offset_y) / scale_y,
    )


def _visible_share(box: Box, tile_size: tuple[int, int]) -> float:
    """The share of the box's area that lies in the tile."""
    left, top, right, bottom = box
    height, width = min(bottom, tile_size[0]) - max(top, 0), min(right, tile_size[1]) - max(left, 0)
    return max(0.0, height) * max(0.0, width) / ((bottom - top) * (right - left))


def _covered(start: float, stop: float, patch_size: int, count: int) -> slice:
    """The patches along one axis whose length the box covers by MIN_PATCH_OVERLAP or more."""
    first = math.ceil(start / patch_size - (1 - MIN_PATCH_OVERLAP))
    last = math.floor(stop / patch_size - MIN_PATCH_OVERLAP)
    return slice(max(first, 0), max(min(last + 1, count), 0))
