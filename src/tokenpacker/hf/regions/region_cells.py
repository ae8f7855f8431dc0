"""Masks of images to what the model gets of regions: the weight of each patch of each tile.

Masks go where the pixels go: both follow `TokenPackerImageProcessor.tile_views`.

Shapes: R regions of all images in order, P tiles of an image at most, n tiles of one image, L patches of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """One entry of regions per image; see `TokenPackerProcessor.__call__`.

    Raises:
        ValueError: when there are more or fewer entries than images.
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
    entries: Sequence[Any],
    image_sizes: Sequence[tuple[int, int]],
    canvases: Sequence[Canvas],
    num_patches: int,
    rule: RegionRule,
) -> dict[str, Tensor]:
    """`region_cells` (R, P, L) and `region_first_tile` (R,) of the regions of images in order, tiles counted from 0.

    P is the most tiles of an image that has regions, with zeros behind those of the others.

    Args:
        entries: per image, as `region_entries` gives them.
        num_patches: L.

    Raises:
        ValueError: as `masks.mark_region`, and for a region of which no patch sees anything.
    """
    cells: list[Tensor] = []
    first_tile: list[int] = []
    start = 0
    for number, (entry, size, canvas) in enumerate(zip(entries, image_sizes, canvases, strict=True), start=1):
        regions = split_regions(entry)
        names = [f"region {place} of image {number}" for place in range(1, len(regions) + 1)]
        marked = [mark_region(region, size, name) for region, name in zip(regions, names, strict=True)]
        cells.append(canvas.weights(marked, rule))  # (r, n, L)
        for region, name, weighs in zip(marked, names, cells[-1].any(dim=2).any(dim=1).tolist(), strict=True):
            if not weighs:
                canvas.check_seen(region, name)
        first_tile += [start] * len(regions)
        start += canvas.grid.num_tiles
    most = max((part.shape[1] for part in cells if len(part)), default=1)
    shown = [torch.nn.functional.pad(part, (0, 0, 0, most - part.shape[1])) for part in cells if len(part)]
    return {
        "region_cells": torch.cat([torch.zeros(0, most, num_patches), *shown]),
        "region_first_tile": torch.tensor(first_tile, dtype=torch.int64),
    }


class Canvas:
    """What an image's tiles show, as one surface: where its patches lie in the image.

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
        # Where patches begin on the canvas, rows and columns. What is left at a tile's edge is in no patch.
        self.starts = [
            (torch.arange(tiles)[:, None] * tile + torch.arange(patches) * patch).flatten()
            for tiles, tile, patches, patch in zip(
                (grid.rows, grid.cols), self.tile_size, patch_grid, self.patch_size, strict=True
            )
        ]
        self.image_size = image_size

    def weights(self, regions: Iterable[MarkedPixels], rule: RegionRule) -> Tensor:
        """(R, n, L), how much each patch of each tile counts for regions of the image."""
        weights = self._covered if rule == "coverage" else self._centred
        nothing = torch.zeros(0, len(self.starts[0]), len(self.starts[1]))
        return tiles_of_cells(torch.cat([nothing, *(weights(region)[None] for region in regions)]), self.grid)

    def check_seen(self, region: MarkedPixels, name: str) -> None:
        """Raises ValueError for a region of which no patch sees anything; `name` opens the message."""
        if not self._covered(region).any():
            raise ValueError(
                f"{name} lies where no patch sees it: beyond a tile's last whole patch, or where image_mode='square'"
                " cuts the image off; mark more of the image, or use image_mode='pad' or 'slice'"
            )

    def resized(self, region: MarkedPixels, rows: Tensor | None = None, cols: Tensor | None = None) -> Tensor:
        """The canvas, whether its pixels are marked, taken with nearest neighbour. Released weights need this.

        Args:
            rows, cols: of the canvas, that are wanted; None takes all.
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
        """(rows, cols) shares, computed in the image itself, so that nothing is resampled."""
        if region.mask is None:
            return covered_share_of_box(region.bounds, *self._spans)
        return covered_share(torch.from_numpy(region.mask)[None], *self._spans, region.bounds[:2])[0]

    def _centred(self, region: MarkedPixels) -> Tensor:
        """(rows, cols) by the released rule; of the canvas only the middle of each patch is drawn."""
        middles = [torch.arange((length - 1) // 2, length // 2 + 1) for length in self.patch_size]  # one or two pixels
        rows, cols = ((start[:, None] + m).flatten() for start, m in zip(self.starts, middles, strict=True))
        return cells_under(self.resized(region, rows, cols)[None], (len(middles[0]), len(middles[1])), "centre")[0]

    @cached_property
    def _spans(self) -> tuple[Tensor, Tensor]:
        """(rows, 2) and (cols, 2), where patches lie in the image."""
        rows, cols = (self.view.spans(axis, self.starts[axis], self.patch_size[axis]) for axis in (0, 1))
        return rows, cols

    @cached_property
    def _nearest(self) -> tuple[Tensor, Tensor]:
        """Which of the image's rows and columns the canvas's show; -1 for padding."""
        canvas = self.grid.canvas_size(self.tile_size)
        rows, cols = (self.view.nearest(axis, canvas[axis], self.image_size[axis]) for axis in (0, 1))
        return rows, cols
