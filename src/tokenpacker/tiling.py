"""From images to tiles: the choice of a tile grid, resizing, cutting, and the way back from tiles to image pixels.

Sizes are (height, width) in pixels; H, W is an image, h, w one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

GridList = Literal["all", "released"]
ThumbnailSource = Literal["image", "canvas"]
Box = tuple[float, float, float, float]
"""(top, left, bottom, right) in pixels."""

# Released weights need this: the original's lists for 16 and 25 tiles hold no longer row or column than its list for 9.
LONGEST_RELEASED_LINE = 9

# Origin of both numbers: the score of the released code.
SIZE_WEIGHT = 0.1  # weight of a matching size, beside a matching aspect ratio
SIZE_HEADROOM = 1.4  # sizes match best when the image is enlarged by this factor


@dataclass(frozen=True, order=True)
class TileGrid:
    """(rows, cols) of an image's tiles. An image of more than one tile has a thumbnail as its last tile."""

    rows: int
    cols: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"tile grid {self.rows}x{self.cols} must have at least one row and one column")

    @property
    def has_thumbnail(self) -> bool:
        """Whether there is more than one tile."""
        return self.rows * self.cols > 1

    @property
    def num_tiles(self) -> int:
        """The number of tiles for the encoder, thumbnail included."""
        return self.rows * self.cols + self.has_thumbnail

    def canvas_size(self, tile_size: tuple[int, int]) -> tuple[int, int]:
        """Returns (height, width) of the canvas that the tiles cover."""
        return self.rows * tile_size[0], self.cols * tile_size[1]


@dataclass(frozen=True)
class TileView:
    """Maps a tile's pixels to the image: y_image = y_tile * scale[0] + offset[0], and x likewise."""

    scale: tuple[float, float]
    offset: tuple[float, float]

    def unclipped(self, box: Box) -> Box:
        """Returns a box of the tile in image pixels; it may reach beyond the image."""
        top, bottom = (y * self.scale[0] + self.offset[0] for y in box[::2])
        left, right = (x * self.scale[1] + self.offset[1] for x in box[1::2])
        return top, left, bottom, right

    def to_image(self, box: Box, image_size: tuple[int, int]) -> Box | None:
        """Returns a box of the tile in image pixels, clipped to the image; None if only padding is there."""
        edges = zip(self.unclipped(box), image_size * 2, strict=True)
        top, left, bottom, right = (min(max(place, 0.0), float(length)) for place, length in edges)
        return (top, left, bottom, right) if bottom > top and right > left else None

    def spans(self, axis: int, starts: Tensor, length: float) -> Tensor:
        """Returns (cells, 2), begin and end of cells along an axis (0 rows, 1 columns) in image pixels."""
        begin = starts.double()[:, None]
        return torch.cat([begin, begin + length], dim=1) * self.scale[axis] + self.offset[axis]

    def nearest(self, axis: int, num_pixels: int, image_length: int) -> Tensor:
        """Returns (num_pixels,), the image's row or column behind each row or column of the tile; -1 for padding.

        Released weights need this: it samples at the upper left corner of each pixel, not at its centre, and computes
        in float32, as torch's "nearest" does.
        """
        places = torch.arange(num_pixels, dtype=torch.float32)
        scale, offset = (torch.tensor(pair[axis], dtype=torch.float32) for pair in (self.scale, self.offset))
        centres = (places + 0.5) * scale + offset
        nearest = (places * scale + offset).floor().long().clamp(0, image_length - 1)
        return torch.where((centres > 0) & (centres < image_length), nearest, -1)


@lru_cache
def tile_grids(max_tiles: int, grid_list: GridList = "all") -> tuple[TileGrid, ...]:
    """Returns the grids that an image may be cut into, ordered by rows, then columns.

    Args:
        max_tiles: limit of rows*cols; the thumbnail is not counted.
        grid_list: "all" has every grid within the limit, as in the paper. "released" has no single row or column longer
            than nine tiles, as the lists of the released weights for 9, 16 and 25 tiles.

    Raises:
        ValueError: if max_tiles is below 1, or if the list is unknown.
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles={max_tiles} must be at least 1")
    if grid_list not in get_args(GridList):
        raise ValueError(f"grid_list={grid_list!r} is unknown; use 'all' or 'released'")
    grids = (TileGrid(r, c) for r in range(1, max_tiles + 1) for c in range(1, max_tiles // r + 1))
    if grid_list == "all":
        return tuple(grids)
    return tuple(
        grid for grid in grids if min(grid.rows, grid.cols) > 1 or grid.rows * grid.cols <= LONGEST_RELEASED_LINE
    )


def fit_within(image_size: tuple[int, int], canvas_size: tuple[int, int]) -> tuple[int, int]:
    """Returns the largest size within the canvas that keeps the image's aspect ratio; each side is at least 1.

    `round` rounds half to even, as in the released code, where a side of 0 makes resizing fail.
    """
    (height, width), (canvas_height, canvas_width) = image_size, canvas_size
    if canvas_height / height <= canvas_width / width:
        return canvas_height, max(1, min(canvas_width, round(width * (canvas_height / height))))
    return max(1, min(canvas_height, round(height * (canvas_width / width)))), canvas_width


def grid_score(image_size: tuple[int, int], grid: TileGrid, tile_size: tuple[int, int]) -> float:
    """Scores a grid for an image: the share of the canvas that the fitted image fills, plus a small term for size.

    The size term is the overlap (intersection over union) of the canvas with the image enlarged by SIZE_HEADROOM.
    A side that rounds to 0 pixels fills nothing. Source: the released code; equal to its score on all golden data.
    """
    canvas_height, canvas_width = grid.canvas_size(tile_size)
    canvas_area = canvas_height * canvas_width
    height, width = image_size
    ratio = min(canvas_height / height, canvas_width / width)
    filled = round(height * ratio) * round(width * ratio) / canvas_area
    large_height, large_width = height * SIZE_HEADROOM, width * SIZE_HEADROOM
    overlap = min(canvas_height, large_height) * min(canvas_width, large_width)
    return filled + SIZE_WEIGHT * overlap / (canvas_area + large_height * large_width - overlap)


def choose_tile_grid(
    image_size: tuple[int, int], tile_size: tuple[int, int], max_tiles: int = 9, grid_list: GridList = "all"
) -> TileGrid:
    """Returns the grid with the highest score, the first of equals.

    Args:
        max_tiles: limit of rows*cols; the thumbnail is not counted.
        grid_list: see `tile_grids`.

    Raises:
        ValueError: if a side of the image or max_tiles is below 1, or if the list is unknown.
    """
    if min(image_size) < 1:
        raise ValueError(f"image size {image_size[0]}x{image_size[1]} has a side below 1 pixel")
    return max(tile_grids(max_tiles, grid_list), key=lambda grid: grid_score(image_size, grid, tile_size))


def resize(image: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """(3, H, W) -> (3, *size), bilinear with half-pixel centres."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    return F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=antialias)[0]


def make_tiles(
    image: Tensor,
    grid: TileGrid,
    tile_size: tuple[int, int],
    *,
    thumbnail_source: ThumbnailSource = "image",
    antialias: bool = True,
) -> Tensor:
    """Returns the tiles (N, 3, h, w) of a normalised image (3, H, W), row by row, with the thumbnail last if any.

    The image is resized into the canvas with its aspect ratio, at the top left. The rest of the canvas is 0, which is
    the mean colour after normalisation.

    Args:
        thumbnail_source: "image" shrinks the image itself. "canvas" shrinks the padded canvas to the image's shape,
            which distorts it; released weights need this.
        antialias: whether to filter when shrinking. Released weights need False.
    """
    canvas = _fit_on_canvas(image, grid.canvas_size(tile_size), antialias)
    height, width = tile_size
    tiles = canvas.unflatten(2, (grid.cols, width)).unflatten(1, (grid.rows, height))  # (3, rows, h, cols, w)
    tiles = tiles.permute(1, 3, 0, 2, 4).flatten(0, 1)  # (rows*cols, 3, h, w)
    if not grid.has_thumbnail:
        return tiles
    if thumbnail_source == "image":
        thumbnail = _fit_on_canvas(image, tile_size, antialias)
    else:
        fitted = fit_within((image.shape[1], image.shape[2]), tile_size)
        thumbnail = _place(resize(canvas, fitted, antialias), tile_size)
    return torch.cat([tiles, thumbnail[None]])


def slice_views(
    image_size: tuple[int, int],
    grid: TileGrid,
    tile_size: tuple[int, int],
    thumbnail_source: ThumbnailSource = "image",
) -> list[TileView]:
    """Returns one view per tile of `make_tiles`, in its order."""
    canvas_size = grid.canvas_size(tile_size)
    fitted = fit_within(image_size, canvas_size)
    scale = (image_size[0] / fitted[0], image_size[1] / fitted[1])
    views = [
        TileView(scale, (row * tile_size[0] * scale[0], col * tile_size[1] * scale[1]))
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    if grid.has_thumbnail:
        small = fit_within(image_size, tile_size)
        shown = (
            image_size if thumbnail_source == "image" else tuple(c * s for c, s in zip(canvas_size, scale, strict=True))
        )
        views.append(TileView((shown[0] / small[0], shown[1] / small[1]), (0.0, 0.0)))
    return views


def _fit_on_canvas(image: Tensor, canvas_size: tuple[int, int], antialias: bool) -> Tensor:
    return _place(resize(image, fit_within((image.shape[1], image.shape[2]), canvas_size), antialias), canvas_size)


def _place(image: Tensor, canvas_size: tuple[int, int]) -> Tensor:
    """Puts the image at the top left of a canvas of zeros."""
    return F.pad(image, (0, canvas_size[1] - image.shape[2], 0, canvas_size[0] - image.shape[1]))
