"""Where the tiles and the tokens of an image lie in it.

Boxes are (top, left, bottom, right) in pixels of the original image unless said otherwise. They may reach beyond the
image, where tiles are padding.

Shapes: N tiles, T packed tokens of a tile, H heads, s scale factor.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from tokenpacker.projectors import TokenPacker, config_from_dict
from tokenpacker.router import AUTO, ScaleFactor
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
        scale_factors: s of each tile, patches per side behind one token.
        reasons: for each tile's scale factor, if the router chose it; else None.
    """

    image: Image.Image
    layout: ImageLayout
    views: list[TileView]
    tile_size: tuple[int, int]
    patch_grid: tuple[int, int]
    scale_factors: tuple[int, ...]
    reasons: tuple[str, ...] | None = None

    @classmethod
    def plan(
        cls,
        processor: TokenPackerProcessor,
        image: Image.Image,
        *,
        scale_factor: ScaleFactor | None = None,
        max_image_tokens: int | None = None,
    ) -> PackedImage:
        """Returns an RGB image as a processor plans it.

        Raises:
            ValueError: for a scale factor or a budget that `TokenPackerProcessor.image_layout` refuses.
        """
        size = (image.height, image.width)
        budget: dict[str, Any] = {"scale_factor": scale_factor, "max_image_tokens": max_image_tokens}
        factors, reasons = None, None
        if scale_factor == AUTO:
            plan = processor.plan_image(image, **budget)
            layout, factors, reasons = plan.layout, plan.scale_factors, plan.reasons
        else:
            layout = processor.image_layout(size, **budget)
        tile_height, tile_width = processor.image_processor.tile_size
        rows, cols = processor.patch_grid
        if factors is None and scale_factor is None:  # the projector's own; the resampler has only a number of tokens
            own: int | None = getattr(config_from_dict(processor.projector_config), "scale_factor", None)
            scale_factor = own or -(-rows // layout.token_grid[0])
        return cls(
            image=image,
            layout=layout,
            views=processor.image_processor.tile_views(size, layout.tile_grid),
            tile_size=(tile_height, tile_width),
            patch_grid=(rows, cols),
            scale_factors=tuple(factors or [scale_factor] * layout.tile_grid.num_tiles),
            reasons=reasons,
        )

    def window_size(self, tile: int) -> tuple[float, float]:
        """(height, width) in tile pixels of the window behind one token of a tile."""
        height, width = (self.tile_size[i] / self.patch_grid[i] * self.scale_factors[tile] for i in (0, 1))
        return height, width

    @property
    def num_full_tokens(self) -> int:
        """The number of tokens at one token per patch, separators included."""
        patches = self.patch_grid[0] * self.patch_grid[1]
        return self.layout.tile_grid.num_tiles * (patches + self.layout.separators)

    def source(self, token: int) -> TokenSource | None:
        """Returns what a token shows; None for a separator. Raises IndexError if there is no such token."""
        size = (self.image.height, self.image.width)
        windows = [self.window_size(tile) for tile in range(len(self.views))]
        return self.layout.source(token, self.views, windows, self.tile_size, size)

    def window_patches(self, source: TokenSource) -> tuple[int, int]:
        """(rows, cols) of the patches behind a token; fewer than s at the edge of a tile."""
        side = self.scale_factors[source.tile]
        rows, cols = (
            min(side, patches - place * side)
            for patches, place in zip(self.patch_grid, (source.row, source.col), strict=True)
        )
        return rows, cols

    def window_box(self, tile: int, row: int, col: int) -> Box:
        """The box of one token's window, cut off at the edge of its tile."""
        (height, width), (tile_height, tile_width) = self.window_size(tile), self.tile_size
        bottom, right = min((row + 1) * height, tile_height), min((col + 1) * width, tile_width)
        return self.views[tile].unclipped((row * height, col * width, bottom, right))

    def tile_box(self, tile: int) -> Box:
        """The box of a whole tile."""
        return self.views[tile].unclipped((0.0, 0.0, float(self.tile_size[0]), float(self.tile_size[1])))

    def attention(
        self, model: TokenPackerForConditionalGeneration, processor: TokenPackerProcessor
    ) -> list[np.ndarray] | None:
        """Returns each tile's (T, H, s, s), its tokens' attention over their windows; None if there is no attention.

        Patches beyond the edge of a tile have the share 0.
        """
        projector = model.model.multi_modal_projector
        if not isinstance(projector, TokenPacker):
            return None
        tiles = processor.image_processor([self.image], tile_grids=[self.layout.tile_grid])["pixel_values"]
        with torch.inference_mode():
            features = model.model.vision_features(tiles.to(model.device))
            of_factor = {s: projector.attention_weights(features, s).float().cpu() for s in set(self.scale_factors)}
        return [of_factor[s][tile].unflatten(-1, (s, s)).numpy() for tile, s in enumerate(self.scale_factors)]
