"""Pictures of the report, as SVG over the embedded image: where tiles and tokens lie, and what each token attends to.

Shapes: N tiles, (h, w) patch grid, (rows, cols) token grid, s scale factor, T = rows*cols, H heads.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
import torch
from markupsafe import Markup
from PIL import Image

from tokenpacker.visualize import Box, PackedImage

SHADE_ALPHA = 215  # of 255, over patches with the weight 0


def grid_picture(packed: PackedImage) -> Markup:
    """Returns the image under its packed tokens (thin lines) and its tiles (thick lines), without the thumbnail."""
    grid, cells = packed.layout.tile_grid, packed.layout.token_grid
    boxes = [packed.tile_box(tile) for tile in range(grid.rows * grid.cols)]
    overlay = Markup('<path class="tokens" d="{}"/><path class="tiles" d="{}"/>').format(
        "".join(_lines(box, cells) for box in boxes), "".join(_lines(box, (1, 1)) for box in boxes)
    )
    description = f"The image under {grid.rows} by {grid.cols} tiles of {cells[0]} by {cells[1]} tokens"
    return _svg(packed.image, overlay, description)


def attention_picture(packed: PackedImage, weights: Sequence[np.ndarray]) -> Markup:
    """Returns the image under a shade: the less a patch gave to its token, the darker.

    Args:
        weights: (T, H, s, s) of each tile, as `PackedImage.attention` gives them.
    """
    shade = Image.fromarray(shade_map(packed, weights))
    black = Image.new("LA", shade.size)
    black.putalpha(shade)
    last_tile = packed.layout.tile_grid.rows * packed.layout.tile_grid.cols - 1
    _, _, bottom, right = packed.tile_box(last_tile)
    top, left, _, _ = packed.tile_box(0)
    overlay = Markup(
        '<image class="pixels" preserveAspectRatio="none" href="{}"'
        ' x="{:.2f}" y="{:.2f}" width="{:.2f}" height="{:.2f}"/>'
    ).format(_data_uri(black), left, top, right - left, bottom - top)
    return _svg(packed.image, overlay, "The image with those patches bright that gave most to their token")


def shade_map(packed: PackedImage, weights: Sequence[np.ndarray]) -> np.ndarray:
    """Returns (height, width) bytes, one for each patch of the tiles, without the thumbnail.

    The largest weight of each window gives 0, a weight of 0 gives `SHADE_ALPHA`.
    """
    grid, (rows, cols) = packed.layout.tile_grid, packed.layout.token_grid
    mean = torch.from_numpy(np.stack(weights[: grid.rows * grid.cols])).mean(dim=2)  # (N, T, H, s, s) -> (N, T, s, s)
    relative = mean / mean.amax(dim=(-2, -1), keepdim=True)
    tiles = relative.unflatten(1, (rows, cols)).transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (N, rows*s, cols*s)
    tiles = tiles[:, : packed.patch_grid[0], : packed.patch_grid[1]]  # (N, h, w): edge windows reach beyond the grid
    canvas = tiles.unflatten(0, (grid.rows, grid.cols)).transpose(1, 2).flatten(2, 3).flatten(0, 1)
    return ((1 - canvas) * SHADE_ALPHA).round().to(torch.uint8).numpy()


def _lines(box: Box, cells: tuple[int, int]) -> str:
    """SVG path of a grid of (rows, cols) cells in a box, its borders included."""
    top, left, bottom, right = box
    rows, cols = cells
    across = [f"M{left:.2f} {top + (bottom - top) * row / rows:.2f}H{right:.2f}" for row in range(rows + 1)]
    down = [f"M{left + (right - left) * col / cols:.2f} {top:.2f}V{bottom:.2f}" for col in range(cols + 1)]
    return "".join(across + down)


def _svg(image: Image.Image, overlay: Markup, description: str) -> Markup:
    return Markup(
        '<svg viewBox="0 0 {width} {height}" role="img" aria-label="{description}">'
        '<image class="pixels" href="{uri}" width="{width}" height="{height}"/>{overlay}</svg>'
    ).format(width=image.width, height=image.height, description=description, uri=_data_uri(image), overlay=overlay)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
