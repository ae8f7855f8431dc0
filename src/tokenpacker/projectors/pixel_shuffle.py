"""Pixel shuffle of InternVL: concatenates the patches of a window on the channel, then LayerNorm and an MLP.

Source: "How Far Are We to GPT-4V?" (InternVL 1.5, arXiv 2404.16821), whose projector normalises, then `Linear, GELU,
Linear`. No patch is averaged away; the first linear layer grows with s*s.

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, T = L/s^2, C vision width, D language width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, ProjectorConfig, register, require_positive
from tokenpacker.projectors.layers import two_linears


@dataclass(frozen=True, kw_only=True)
class PixelShuffleConfig(ProjectorConfig):
    """Config of `PixelShuffle`, which reads the query level alone.

    Args:
        scale_factor: s, the patches per side in one packed token. The weights depend on it.
    """

    name: ClassVar[str] = "pixel-shuffle"

    scale_factor: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("scale_factor", self.scale_factor)

    def token_grid(self, patch_grid: tuple[int, int], scale_factor: int | None = None) -> tuple[int, int]:
        """Returns (h/s, w/s).

        Raises:
            ValueError: if the scale factor is not the config's, or if it does not divide both sides of the grid: a
                window with fewer patches would leave channels empty.
        """
        if scale_factor not in (None, self.scale_factor):
            raise ValueError(
                f"scale_factor={scale_factor} but the weights of this pixel-shuffle are made for {self.scale_factor};"
                " leave it out, or train one with that scale_factor"
            )
        height, width = patch_grid
        if height % self.scale_factor or width % self.scale_factor:
            raise ValueError(
                f"scale_factor={self.scale_factor} does not divide patch_grid={height}x{width}; pixel-shuffle needs a"
                " divisor of both sides"
            )
        return height // self.scale_factor, width // self.scale_factor


@register(PixelShuffleConfig)
class PixelShuffle(Projector):
    """`space to depth, LayerNorm(s*s*C), Linear(s*s*C->D), GELU, Linear(D->D)`.

    The channels of a packed token are those of its window's patches, row by row.
    """

    config: PixelShuffleConfig

    def __init__(self, config: PixelShuffleConfig):
        super().__init__()
        self.config = config
        window_dim = config.vision_dim * config.scale_factor**2
        self.norm = nn.LayerNorm(window_dim)
        self.mlp = two_linears(window_dim, config.language_dim)
        self.init_weights()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, T, D). Raises ValueError for features of other widths, and if the config's `token_grid` does."""
        self.check_features(features)
        rows, cols = self.config.token_grid(features.patch_grid, scale_factor)
        side = self.config.scale_factor
        windows = features.query.unflatten(1, (rows, side, cols, side))  # (N, rows, s, cols, s, C)
        windows = windows.transpose(2, 3).flatten(3).flatten(1, 2)  # (N, T, s*s*C)
        return self.mlp(self.norm(windows))  # (N, T, D)
