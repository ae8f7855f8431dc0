"""Where the tiles and the tokens of an image lie in it.

Boxes are (top, left, bottom, right) in pixels of the original image unless said otherwise. They may reach beyond the
image, where tiles are padding.

Shapes: N tiles, T packed tokens of a tile, H heads, s scale factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from tokenpacker.projectors import TokenPacker, config_from_dict
from tokenpacker.sequence import ImageLayout, TokenSource
from tokenpacker.tiling import Box, TileView

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor


@dataclass(frozen=True)
class PackedImage:
    """An image and where its tokens lie in it.

    Args:
        image: RGB, in its original size.
        layout: its token sequence.
        views: one per tile.
        tile_size: (height, width) of a tile in tile pixels.
        patch_grid: (rows, cols) of patches in a tile.
        scale_factor: s, patches per side behind one token.
    """

    image: Image.Image
    layout: ImageLayout
    views: list[TileView]
    tile_size: tuple[int, int]
    patch_grid: tuple[int, int]
    scale_factor: int

    @classmethod
    def plan(
        cls,
        processor: TokenPackerProcessor,
        image: Image.Image,
        *,
        scale_factor: int | None = None,
        max_image_tokens: int | None = None,
    ) -> PackedImage:
        """Returns an RGB image as a processor plans it.

        Raises:
            ValueError: for a scale factor or a budget that `TokenPackerProcessor.image_layout` refuses.
        """
        size = (image.height, image.width)
        layout = processor.image_layout(size, scale_factor=scale_factor, max_image_tokens=max_image_tokens)
        tile_height, tile_width = processor.image_processor.tile_size
        rows, cols = processor.patch_grid
        if scale_factor is None:  # the projector's own; the resampler has none, only a number of tokens
            own: int | None = getattr(config_from_dict(processor.projector_config), "scale_factor", None)
            scale_factor = own or -(-rows // layout.token_grid[0])
        return cls(
            image=image,
            layout=layout,
            views=processor.image_processor.tile_views(size, layout.tile_grid),
            tile_size=(tile_height, tile_width),
            patch_grid=(rows, cols),
            scale_factor=scale_factor,
        )

    @property
    def window_size(self) -> tuple[float, float]:
        """(height, width) in tile pixels of the window behind one token."""
        height, width = (self.tile_size[i] / self.patch_grid[i] * self.scale_factor for i in (0, 1))
        return height, width

    @property
    def num_full_tokens(self) -> int:
        """The number of tokens at one token per patch, separators included."""
        patches = self.patch_grid[0] * self.patch_grid[1]
        return self.layout.tile_grid.num_tiles * (patches + self.layout.separators)

    def source(self, token: int) -> TokenSource | None:
        """Returns what a token shows; None for a separator. Raises IndexError if there is no such token."""
        size = (self.image.height, self.image.width)
        return self.layout.source(token, self.views, self.window_size, self.tile_size, size)

    def window_patches(self, source: TokenSource) -> tuple[int, int]:
        """(rows, cols) of the patches behind a token; fewer than s at the edge of a tile."""
        rows, cols = (
            min(self.scale_factor, patches - place * self.scale_factor)
            for patches, place in zip(self.patch_grid, (source.row, source.col), strict=True)
        )
        return rows, cols

    def window_box(self, tile: int, row: int, col: int) -> Box:
        """The box of one token's window, cut off at the edge of its tile."""
        (height, width), (tile_height, tile_width) = self.window_size, self.tile_size
        bottom, right = min((row + 1) * height, tile_height), min((col + 1) * width, tile_width)
        return self.views[tile].unclipped((row * height, col * width, bottom, right))

    def tile_box(self, tile: int) -> Box:
        """The box of a whole tile."""
        return self.views[tile].unclipped((0.0, 0.0, float(self.tile_size[0]), float(self.tile_size[1])))

    def attention(
        self, model: TokenPackerForConditionalGeneration, processor: TokenPackerProcessor
    ) -> np.ndarray | None:
        """Returns (N, T, H, s, s), each token's attention over its window; None if the projector has no attention.

        Patches beyond the edge of a tile have the share 0.
        """
        projector = model.model.multi_modal_projector
        if not isinstance(projector, TokenPacker):
            return None
        tiles = processor.image_processor([self.image], tile_grids=[self.layout.tile_grid])["pixel_values"]
        with torch.inference_mode():
            features = model.model.vision_features(tiles.to(model.device))
            weights = projector.attention_weights(features, self.scale_factor)  # (N, T, H, s*s)
        return weights.float().cpu().unflatten(-1, (self.scale_factor, self.scale_factor)).numpy()
