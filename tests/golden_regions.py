"""What the golden data of the region branch were computed from: shapes drawn as masks, the region module's weights."""

from __future__ import annotations

import torch
from torch import Tensor

from golden_weights import seeded

PREFIX = "mask_extractor."
NUM_LEVELS, VISION_DIM = 4, 1024


def drawn(shape: list, size: tuple[int, int]) -> Tensor:
    """(H, W) mask of `["rect", y0, x0, y1, x1]`, ends exclusive, or `["disc", cy, cx, r]`."""
    kind, *numbers = shape
    y, x = torch.arange(size[0])[:, None], torch.arange(size[1])[None]
    if kind == "rect":
        top, left, bottom, right = numbers
        return (y >= top) & (y < bottom) & (x >= left) & (x < right)
    cy, cx, radius = numbers
    return (y - cy) ** 2 + (x - cx) ** 2 <= radius**2


def region_weights(language_dim: int) -> dict[str, Tensor]:
    """The original's region module, by its own names: one linear per level, and one to the language model's width."""
    shapes = {f"{PREFIX}res_layers.{level}": (VISION_DIM, VISION_DIM) for level in range(NUM_LEVELS)}
    shapes[f"{PREFIX}feat_linear"] = (language_dim, VISION_DIM)
    weights = {f"{name}.weight": seeded(f"{name}.weight", shape, std=0.05) for name, shape in shapes.items()}
    return weights | {f"{name}.bias": seeded(f"{name}.bias", shape[:1], std=0.02) for name, shape in shapes.items()}
