"""Regions of images to the model's inputs: the weight of each patch of each tile.

Masks follow `TokenPackerImageProcessor.tile_views`, as the pixels do.

Shapes: R regions of all images in order, P tiles of an image at most, n tiles of one image, L patches of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokenpacker.hf.processing.image_processor import TokenPackerImageProcessor
from tokenpacker.hf.regions.marked_pixels import MarkedPixels
from tokenpacker.hf.regions.masks import is_lone_region, mark_region, split_regions
from tokenpacker.regions import RegionRule, cells_under, covered_share, covered_share_of_box, tiles_of_cells
from tokenpacker.tiling import TileGrid, TileView


def region_entries(region_masks: Any, num_images: int) -> list[Any]:
    """One entry of regions per image, from the argument of `TokenPackerProcessor.__call__`.

    Raises:
        ValueError: if entries and images differ in number.
    """
    if region_masks is None:
        return [None] * num_images
    if is_lone_region(region_masks):
        region_masks = [region_masks]
    if not isinstance(region_masks, Sequence) or len(region_masks) != num_images:
        given = f"{len(region_masks)} entries" if isinstance(region_masks, Sequence) else type(region_masks).__name__
        raise ValueError(
            f"region_masks has {given} for {num_images} images; pass one list of regions for each image, [] for none"
        )
    return list(region_masks)


def region_tensors(
    entries: Sequence[Any], canvases: Sequence[Canvas], num_patches: int, rule: RegionRule
) -> dict[str, Tensor]:
    """`region_cells` (R, P, L) and `region_first_tile` (R,) of the regions of images in order, tiles counted from 0.

    P is the largest number of tiles among images with regions. Rows of images with fewer tiles end in zeros.

    Args:
        entries: per image, as `region_entries` gives them.
        canvases: one per image.
        num_patches: L.

    Raises:
        ValueError: for a region that cannot be read, and for one that no patch sees.
    """
    cells: list[Tensor] = [torch.zeros(0, 1, num_patches)]
    first_tile: list[int] = []
    start = 0
    for number, (entry, canvas) in enumerate(zip(entries, canvases, strict=True), start=1):
        for place, region in enumerate(split_regions(entry), start=1):
            name = f"region {place} of image {number}"
            marked = mark_region(region, canvas.image_size, name)
            cells.append(canvas.weights(marked, rule)[None])  # (1, n, L)
            if not cells[-1].any():
                canvas.check_seen(marked, name)
            first_tile.append(start)
        start += canvas.grid.num_tiles
    most = max(part.shape[1] for part in cells)
    padded = [torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1])) for part in cells]
    return {"region_cells": torch.cat(padded), "region_first_tile": torch.tensor(first_tile, dtype=torch.int64)}


class Canvas:
    """The surface that an image's tiles show, and where its patches lie in the image.

    Args:
        grid: of tiles.
        patch_grid: (rows, cols) of patches in a tile.
    """

    def __init__(
        self,
        images: TokenPackerImageProcessor,
        image_size: tuple[int, int],
        grid: TileGrid,
        patch_grid: tuple[int, int],
    ) -> None:
        self.grid = grid
        self.tile_size = (images.tile_size[0], images.tile_size[1])
        self.patch_size = (self.tile_size[0] // patch_grid[0], self.tile_size[1] // patch_grid[1])
        self.view: TileView = images.tile_views(image_size, grid)[0]  # the other tiles continue the first one
        # Rows and columns of the canvas where patches begin. A tile's edge may be in no patch.
        self.starts = [
            (torch.arange(tiles)[:, None] * tile + torch.arange(patches) * patch).flatten()
            for tiles, tile, patches, patch in zip(
                (grid.rows, grid.cols), self.tile_size, patch_grid, self.patch_size, strict=True
            )
        ]
        self.image_size = image_size

    def weights(self, region: MarkedPixels, rule: RegionRule) -> Tensor:
        """(n, L), how much each patch of each tile counts for a region of the image."""
        cells = self._covered(region) if rule == "coverage" else self._centred(region)
        return tiles_of_cells(cells[None], self.grid)[0]

    def check_seen(self, region: MarkedPixels, name: str) -> None:
        """Raises ValueError for a region that no patch sees; `name` opens the message."""
        if not self._covered(region).any():
            raise ValueError(
                f"{name} lies where no patch sees it: beyond a tile's last whole patch, or where image_mode='square'"
                " cuts the image off; mark more of the image, or use image_mode='pad' or 'slice'"
            )

    def resized(self, region: MarkedPixels, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
        """The mask of the canvas, by nearest neighbour. Released weights need this.

        Args:
            rows, cols: those of the canvas that are wanted; None takes all.
        """
        top, left, bottom, right = region.bounds
        row, col = self._nearest
        row, col = row if rows is None else row[rows], col if cols is None else col[cols]
        marked = ((row >= top) & (row < bottom))[:, None] & (col >= left) & (col < right)
        if region.mask is None:
            return marked
        row, col = (row - top).clamp(0, bottom - top - 1), (col - left).clamp(0, right - left - 1)
        return marked & torch.from_numpy(region.mask)[row[:, None], col]

    def _covered(self, region: MarkedPixels) -> Tensor:
        """(rows, cols) shares, computed in the image itself, without resampling."""
        if region.mask is None:
            return covered_share_of_box(region.bounds, *self._spans)
        return covered_share(torch.from_numpy(region.mask)[None], *self._spans, region.bounds[:2])[0]

    def _centred(self, region: MarkedPixels) -> Tensor:
        """(rows, cols) by the released rule. Only the middle of each patch of the canvas is drawn."""
        middles = [torch.arange((length - 1) // 2, length // 2 + 1) for length in self.patch_size]  # one or two pixels
        rows, cols = ((start[:, None] + m).flatten() for start, m in zip(self.starts, middles, strict=True))
        return cells_under(self.resized(region, rows, cols)[None], (len(middles[0]), len(middles[1])), "centre")[0]

    @cached_property
    def _spans(self) -> tuple[Tensor, Tensor]:
        """(rows, 2) and (cols, 2): where patches begin and end in the image."""
        rows, cols = (self.view.spans(axis, self.starts[axis], self.patch_size[axis]) for axis in (0, 1))
        return rows, cols

    @cached_property
    def _nearest(self) -> tuple[Tensor, Tensor]:
        """For each row and column of the canvas that of the image; -1 for padding."""
        canvas = self.grid.canvas_size(self.tile_size)
        rows, cols = (self.view.nearest(axis, canvas[axis], self.image_size[axis]) for axis in (0, 1))
        return rows, cols
