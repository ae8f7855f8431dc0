"""Where tiles and tokens lie in an image, for the page's script, and a picture of what one token attends to."""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from html import escape
from threading import Lock
from typing import Any

import numpy as np
from PIL import Image

from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor
from tokenpacker.router import ScaleFactor
from tokenpacker.ui.sessions import Budget, ByteStore, Picture
from tokenpacker.visualize import PackedImage, draw_attention
from tokenpacker.visualize.explained_token import token_weights

PREVIEW_SIDE = 1024  # pixels
KEPT_WEIGHTS = 8  # images whose attention is kept
WITHIN = "{place} of {count:,}: {where} of {tile}, {rows} x {cols} patches"


def data_address(image: Image.Image) -> str:
    """A small copy of an RGB image as a data address."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    small.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def plan(processor: TokenPackerProcessor, image: Any, budget: Budget) -> PackedImage:
    """An image as the processor plans it. Without "auto", anything with its width and height will do.

    Errors as `PackedImage.plan`.
    """
    return PackedImage.plan(processor, image, scale_factor=budget[0], max_image_tokens=budget[1])


def draw_grid(packed: PackedImage) -> dict[str, Any]:
    """What the page's script draws over an image; boxes are (top, left, bottom, right) in pixels of the image."""
    grid = packed.layout.tile_grid
    windows = [packed.window_size(tile) for tile in range(grid.num_tiles)]
    return {
        "size": [packed.image.width, packed.image.height],
        "tiles": [grid.rows, grid.cols],
        "tokens": [list(tokens) for tokens in packed.layout.token_grids],
        "window": [[own / whole for own, whole in zip(window, packed.tile_size, strict=True)] for window in windows],
        "boxes": [packed.tile_box(tile) for tile in range(grid.num_tiles)],
    }


class Explainer:
    """Explains tokens. It may be called from many threads, and uses the model for one at a time."""

    def __init__(
        self, model: TokenPackerForConditionalGeneration, processor: TokenPackerProcessor, store: ByteStore
    ) -> None:
        self.model, self.processor, self.store = model, processor, store
        self._lock = Lock()
        self._kept = lru_cache(KEPT_WEIGHTS)(self._attention)

    def explain(self, picture: Picture, budget: Budget, tile: int, row: int, col: int) -> str:
        """HTML about the token of a window.

        Raises:
            ValueError: for an image that is not kept any more, and a token that does not exist.
        """
        packed = plan(self.processor, picture.load(self.store), budget)
        grids, counts = packed.layout.token_grids, packed.layout.tile_tokens
        if not (0 <= tile < len(grids) and 0 <= row < grids[tile][0] and 0 <= col < grids[tile][1]):
            raise ValueError("this image has no such token; choose one in its grid")
        token = sum(counts[:tile]) + tile * packed.layout.separators + row * grids[tile][1] + col
        source = packed.source(token)
        assert source is not None
        height, width = packed.window_patches(source)
        name = "the thumbnail" if source.is_thumbnail else f"tile {tile + 1}"
        told = WITHIN.format(
            place=f"Token {token + 1:,}",
            count=packed.layout.num_tokens,
            where=f"row {row + 1}, column {col + 1}",
            tile=name,
            rows=height,
            cols=width,
        )
        if source.box is None:
            return _html(told + "; it shows padding alone.")
        with self._lock:
            weights = self._kept(picture, *budget)
        if weights is None:
            return _html(told + f". The {self.model.config.projector.name} projector has no attention over a window.")
        own = token_weights(packed, weights, token)
        shares = ", ".join(f"{share:.0%}" for share in own.mean(axis=0).flatten())
        panel = draw_attention(packed, token, own)
        return _html(
            f"{told}. Percentages: the mean attention of its {len(own)} heads; below, each head.",
            f'<img src="{data_address(panel)}" width="{panel.width}" height="{panel.height}"'
            f' alt="The window and the attention over its patches, row by row: {shares}">',
        )

    def _attention(self, picture: Picture, scale_factor: ScaleFactor | None, most: int) -> list[np.ndarray] | None:
        packed = plan(self.processor, picture.load(self.store), (scale_factor, most))
        return packed.attention(self.model, self.processor)


def _html(text: str, more: str = "") -> str:
    return f"<p>{escape(text)}</p>{more}"
