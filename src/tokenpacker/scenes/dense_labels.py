"""The truth about every patch of every tile: what the encoder is pre-trained to tell from pixels.

The same labels, written as a bag of attributes per window, describe an image to the language model before it has ever
seen one (`train.described`).

Shapes: N tiles, (h, w) patch grid, K label heads.
"""

import bisect
import math
import string
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from tokenpacker.scenes.fine_print import WORDS
from tokenpacker.scenes.scene import COLORS, KINDS, SHAPES, Item, Scene, glyph_edges
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
    "anchor": KINDS,  # the patch that holds the centre of an object: one per object, so that objects can be counted
    "left": GLYPHS,  # the character in the left half of a patch, and in the right half: reading starts with letters
    "right": GLYPHS,
}
ATTRIBUTE_HEADS = tuple(HEADS)[:9]  # what describes an image; single letters only help the encoder to learn words
NUM_CLASSES = {head: 1 + len(classes) for head, classes in HEADS.items()}
HEAD_INDEX = {head: index for index, head in enumerate(HEADS)}
UNKNOWN = -1  # too little of the object is visible to tell: neither rewarded nor punished

MIN_PATCH_OVERLAP = 0.3  # share of a patch's height, and of its width, that an object's box must cover
RECOGNISABLE = 0.45  # visible share of an object from which it counts as recognisable
GONE = 0.2  # visible share below which it counts as absent
UNREADABLE_SCALE = 1.6  # image pixels per tile pixel beyond which type of this size cannot be read

Labels = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Area:
    """A box in the pixels of one tile."""

    top: float
    left: float
    bottom: float
    right: float

    def visible_share(self, tile_size: tuple[int, int]) -> float:
        height = min(self.bottom, tile_size[0]) - max(self.top, 0)
        width = min(self.right, tile_size[1]) - max(self.left, 0)
        return max(0.0, height) * max(0.0, width) / ((self.bottom - self.top) * (self.right - self.left))

    def patches(self, patch_size: int, patch_grid: tuple[int, int]) -> tuple[slice, slice]:
        """Rows and columns of the patches whose height and width this box covers by MIN_PATCH_OVERLAP or more."""
        rows = _covered(self.top, self.bottom, patch_size, patch_grid[0])
        return rows, _covered(self.left, self.right, patch_size, patch_grid[1])


def _covered(start: float, stop: float, patch_size: int, count: int) -> slice:
    first = math.ceil(start / patch_size - (1 - MIN_PATCH_OVERLAP))
    last = math.floor(stop / patch_size - MIN_PATCH_OVERLAP)
    return slice(max(first, 0), max(min(last + 1, count), 0))


def label_tiles(
    scene: Scene, grid: TileGrid, tile_size: tuple[int, int], patch_size: int, tiles: Sequence[int] | None = None
) -> Tensor:
    """(N, K, h, w) class indices for the tiles that `make_tiles` cuts from the scene's picture; UNKNOWN where unclear.

    `tiles` picks some of them; all when None.
    """
    views = slice_views((scene.height, scene.width), grid, tile_size)
    views = views if tiles is None else [views[tile] for tile in tiles]
    patch_grid = (tile_size[0] // patch_size, tile_size[1] // patch_size)
    labels = np.zeros((len(views), len(HEADS), *patch_grid), dtype=np.int64)
    for tile, view in enumerate(views):
        for item in scene.items:
            _label_item(labels[tile], item, scene, view, tile_size, patch_size)
    return torch.from_numpy(labels)


def _label_item(
    labels: Labels, item: Item, scene: Scene, view: TileView, tile_size: tuple[int, int], patch_size: int
) -> None:
    patch_grid = (labels.shape[1], labels.shape[2])
    outer = _to_tile(item.outer_box, view)
    if outer.visible_share(tile_size) == 0:
        return
    rows, columns = outer.patches(patch_size, patch_grid)
    values = {"kind": _class("kind", item.kind), "color": _class("color", item.color)}
    if item.frame is not None:
        values["frame"] = _class("frame", item.frame)
    area = _to_tile(item.box, view)
    visible = area.visible_share(tile_size)
    if item.kind == "shape":
        values["shape"] = _seen("shape", item.text, visible)
    else:
        values |= _text_values(item, area, view, tile_size)
        if item.above is not None:
            mark = next(other for other in scene.items if other.kind == "shape" and _is_just_above(other, item))
            values["above"] = _seen("above", item.above, _to_tile(mark.box, view).visible_share(tile_size))
    if visible < GONE:
        values["color"] = UNKNOWN
    for head, value in values.items():
        labels[HEAD_INDEX[head], rows, columns] = value
    if view.scale[0] >= UNREADABLE_SCALE:
        return
    if item.kind != "shape":
        _label_glyphs(labels[:, rows, columns], item, area, columns.start, patch_size)
    row, column = int((area.top + area.bottom) / 2 // patch_size), int((area.left + area.right) / 2 // patch_size)
    if 0 <= row < patch_grid[0] and 0 <= column < patch_grid[1]:
        labels[HEAD_INDEX["anchor"], row, column] = _class("anchor", item.kind)


def _label_glyphs(labels: Labels, item: Item, area: _Area, first_column: int, patch_size: int) -> None:
    """Names the characters at a quarter and three quarters of each patch's width; `labels` are the text's patches."""
    edges = glyph_edges(item.text, item.font_size)
    stretch = (area.right - area.left) / edges[-1]
    boundaries = [area.left + edge * stretch for edge in edges]
    classes = [0, *(_class("left", glyph) for glyph in item.text), 0]
    for head, place in (("left", 0.25), ("right", 0.75)):
        for column in range(labels.shape[2]):
            middle = (first_column + column + place) * patch_size
            labels[HEAD_INDEX[head], :, column] = classes[bisect.bisect_left(boundaries, middle)]


def _text_values(item: Item, area: _Area, view: TileView, tile_size: tuple[int, int]) -> dict[str, int]:
    """Labels of a word or a number, as far as it can be read in this tile."""
    heads = ("word",) if item.kind == "word" else ("tens", "ones")
    if view.scale[0] >= UNREADABLE_SCALE:
        return dict.fromkeys(heads, UNKNOWN)
    if item.kind == "word":
        return {"word": _class("word", item.text) if area.visible_share(tile_size) >= RECOGNISABLE else UNKNOWN}
    middle = (area.left + area.right) / 2
    halves = (_Area(area.top, area.left, area.bottom, middle), _Area(area.top, middle, area.bottom, area.right))
    return {
        head: _seen(head, digit, half.visible_share(tile_size))
        for head, digit, half in zip(heads, item.text, halves, strict=True)
    }


def _seen(head: str, name: str, visible: float) -> int:
    if visible >= RECOGNISABLE:
        return _class(head, name)
    return UNKNOWN if visible > GONE else 0


def _class(head: str, name: str) -> int:
    return 1 + HEADS[head].index(name)


def _is_just_above(mark: Item, text: Item) -> bool:
    """Whether this shape is the one that marks the text: crowded scenes may hold several of a kind."""
    gap = text.box[1] - mark.box[3]
    overlap = min(mark.box[2], text.box[2]) - max(mark.box[0], text.box[0])
    return mark.text == text.above and 0 <= gap <= 8 and overlap > 0


def _to_tile(box: tuple[float, float, float, float], view: TileView) -> _Area:
    left, top, right, bottom = box
    (scale_y, scale_x), (offset_y, offset_x) = view.scale, view.offset
    return _Area(
        (top - offset_y) / scale_y,
        (left - offset_x) / scale_x,
        (bottom - offset_y) / scale_y,
        (right - offset_x) / scale_x,
    )
