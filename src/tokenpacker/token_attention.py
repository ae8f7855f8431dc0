"""The attention of a packed token over the patches of its window, for `tokenpacker show`.

Shapes: N tiles, T tokens of a tile, H heads, s scale factor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import ImageStat

from tokenpacker.projectors import TokenPacker
from tokenpacker.visualize import PackedImage

if TYPE_CHECKING:
    from tokenpacker.hf import TokenPackerForConditionalGeneration, TokenPackerProcessor


def explain_token(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    packed: PackedImage,
    token: int | None = None,
    scale_factor: int | None = None,
) -> tuple[int | None, np.ndarray | None]:
    """A token, and its attention (H, rows, cols) over the patches of its window.

    Args:
        token: index in the image's token sequence; None takes the clearest one.

    Returns:
        The token is None if none is given and none is clear; the attention is None if the projector has none.

    Raises:
        ValueError: if the image has no such token, or if the token is a separator.
    """
    if token is not None:
        _check_token(packed, token)
    weights = window_attention(model, processor, packed, scale_factor)
    if weights is None:
        return token, None
    token = clearest_token(packed, weights) if token is None else token
    return token, None if token is None else _of_token(packed, weights, token)


def window_attention(
    model: TokenPackerForConditionalGeneration,
    processor: TokenPackerProcessor,
    packed: PackedImage,
    scale_factor: int | None = None,
) -> np.ndarray | None:
    """(N, T, H, s, s), the attention of every token of an image over its window; None if the projector has none."""
    projector = model.model.multi_modal_projector
    if not isinstance(projector, TokenPacker):
        return None
    inputs = processor.image_processor([packed.image], tile_grids=[packed.layout.tile_grid])
    with torch.inference_mode():
        features = model.model.vision_features(inputs["pixel_values"].to(model.device))
        weights = projector.attention_weights(features, scale_factor)  # (N, T, H, s*s)
    side = packed.scale_factor
    return weights.float().cpu().unflatten(-1, (side, side)).numpy()


def clearest_token(packed: PackedImage, weights: np.ndarray) -> int | None:
    """The token with the most contrast in its window and the most selective attention; None if all show padding.

    The score is the product of two terms: the standard deviation of the window's pixels, which is 0 for a blank
    window; and the largest weight, averaged over heads, minus an even one, which is 0 for a window of one patch.
    """
    grey = packed.image.convert("L")
    clarity: dict[int, float] = {}
    for token in range(packed.layout.num_tokens):
        source = packed.source(token)
        if source is None or source.box is None or source.is_thumbnail:
            continue
        top, left, bottom, right = source.box
        pixels = grey.crop((int(left), int(top), math.ceil(right), math.ceil(bottom)))
        mean = _of_token(packed, weights, token).mean(axis=0)
        clarity[token] = ImageStat.Stat(pixels).stddev[0] * float(mean.max() - 1 / mean.size)
    return max(clarity, key=lambda token: clarity[token], default=None)


def _check_token(packed: PackedImage, token: int) -> None:
    count = packed.layout.num_tokens
    if not 0 <= token < count:
        raise ValueError(f"token {token} does not exist; the image has the tokens 0 to {count - 1}")
    if packed.source(token) is None:
        raise ValueError(f"token {token} is a separator and shows nothing; choose another, such as {token - 1}")


def _of_token(packed: PackedImage, weights: np.ndarray, token: int) -> np.ndarray:
    """(H, rows, cols), the weights of the patches that exist, for a token that is not a separator."""
    tile, place = divmod(token, packed.layout.tokens_per_tile + packed.layout.separators)
    source = packed.source(token)
    assert source is not None
    rows, cols = packed.window_patches(source)
    return weights[tile, place, :, :rows, :cols]
