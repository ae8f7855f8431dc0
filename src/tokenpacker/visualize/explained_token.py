"""The token that the page of `tokenpacker show` explains, and its attention over its window.

Shapes: N tiles, T packed tokens of a tile, H heads, s scale factor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import ImageStat

from tokenpacker.visualize.packed_image import PackedImage


def check_token(packed: PackedImage, token: int) -> None:
    """Raises ValueError if the image has no such token, and for a separator."""
    count = packed.layout.num_tokens
    if not 0 <= token < count:
        raise ValueError(f"token {token} does not exist; the image has the tokens 0 to {count - 1}")
    if packed.source(token) is None:
        raise ValueError(f"token {token} is a separator and shows nothing; choose another, such as {token - 1}")


def clearest_token(packed: PackedImage, weights: Sequence[np.ndarray]) -> int | None:
    """The token with the most contrast in its window and the most selective attention; None if all show padding.

    The score is the product of two terms: the standard deviation of the window's pixels, which is 0 for a blank
    window; and the largest weight, averaged over heads, minus an even one, which is 0 for a window of one patch.

    Args:
        weights: of all tiles; see `PackedImage.attention`.
    """
    grey = packed.image.convert("L")
    clarity: dict[int, float] = {}
    for token in range(packed.layout.num_tokens):
        source = packed.source(token)
        if source is None or source.box is None or source.is_thumbnail:
            continue
        top, left, bottom, right = source.box
        pixels = grey.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
        mean = token_weights(packed, weights, token).mean(axis=0)
        clarity[token] = ImageStat.Stat(pixels).stddev[0] * float(mean.max() - 1 / mean.size)
    return max(clarity, key=lambda token: clarity[token], default=None)


def token_weights(packed: PackedImage, weights: Sequence[np.ndarray], token: int) -> np.ndarray:
    """(H, rows, cols), the weights of the patches that exist, for a token that is not a separator."""
    source, found = packed.source(token), packed.layout.place(token)
    assert source is not None
    assert found is not None
    tile, place = found
    rows, cols = packed.window_patches(source)
    return weights[tile][place, :, :rows, :cols]
