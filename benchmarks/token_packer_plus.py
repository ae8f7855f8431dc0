"""TokenPacker with more options, each off by default: with all of them off it is `TokenPacker`, weight by weight.

They stand outside the package because their measurement, in `docs/comparison.md`, gives no reason to have them there.
`dense_query`, which was measured beside them, is an option of `TokenPacker` itself.

Shapes: as in `token_packer.py`; K patches per window with its margin, one more with the global token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.token_packer import (
    TokenPacker,
    TokenPackerProjectorConfig,
    extension,
    window_mask,
    windows,
)

POSITIONS = 4  # places to a side of a window, in its learned positions; other windows interpolate between them


@dataclass(frozen=True, kw_only=True)
class TokenPackerPlusConfig(TokenPackerProjectorConfig):
    """Config of `TokenPackerPlus`.

    Args:
        window_position: keys and values know at which place of their window they lie.
        window_margin: patches that a window reaches beyond each of its sides.
        global_token: each window has one more key and value, the mean of its tile's.
        query_level: which of the levels the query is read from, counted from 0; None takes the features' own query.
    """

    name: ClassVar[str] = "token-packer-plus"

    window_position: bool = False
    window_margin: int = 0
    global_token: bool = False
    query_level: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.queries_per_side != 1:
            raise ValueError(f"queries_per_side={self.queries_per_side}, but a wide window has one query; use 1")
        if not isinstance(self.window_margin, int) or self.window_margin < 0:
            raise ValueError(f"window_margin={self.window_margin!r} must be an integer of at least 0")
        if self.query_level is not None and self.query_level not in range(self.num_levels):
            raise ValueError(f"query_level={self.query_level!r} must be below num_levels={self.num_levels}, or None")


class TokenPackerPlus(TokenPacker):
    """TokenPacker whose query, windows and keys may know more. Any grid and scale factor that `TokenPacker` takes."""

    config: TokenPackerPlusConfig

    def __init__(self, config: TokenPackerPlusConfig):
        super().__init__(config)
        if config.window_position:
            self.window_position = nn.Parameter(torch.empty(config.vision_dim, POSITIONS, POSITIONS))
        self.init_weights()

    def init_weights(self) -> None:
        """Linears as of every projector; positions are drawn with standard deviation 0.02."""
        super().init_weights()
        if hasattr(self, "window_position"):
            nn.init.trunc_normal_(self.window_position, std=0.02)

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """(N, T, D), as `TokenPacker.forward`."""
        self.check_features(features)
        scale = self.config.resolve_scale(features.patch_grid, scale_factor)
        queries, keys, mask = self._queries_and_keys(features, scale)
        values = self._surroundings(self.value_norm(self.value_mlp(features.levels)), features.patch_grid, scale)
        absorbed = self.attention(queries, keys, values, mask)[:, :, 0]  # (N, T, C)
        return self.output_mlp(absorbed + queries[:, :, 0] if self.config.dense_query else absorbed)

    def _queries_and_keys(self, features: VisionFeatures, scale: int) -> tuple[Tensor, Tensor, Tensor | None]:
        grid, level = features.patch_grid, self.config.query_level
        keys = self._surroundings(self.key_norm(self.key_mlp(features.levels)), grid, scale)
        mask = self._surroundings_mask(grid, scale, keys.device)  # (T, K)
        if level is not None:
            query = features.levels.chunk(self.config.num_levels, dim=-1)[level]
            features = VisionFeatures(query, features.levels, grid)
        return self._queries(features, scale), keys, None if mask is None else mask[:, None]

    def _surroundings(self, tokens: Tensor, patch_grid: tuple[int, int], scale: int) -> Tensor:
        """(N, L, C) -> (K, N, T, C): each window with its margin and positions, then the tile's mean."""
        around = self._wide_windows(tokens, patch_grid, scale)
        if self.config.window_position:
            side = round(len(around) ** 0.5)
            places = F.interpolate(self.window_position[None], (side, side), mode="bilinear")  # (1, C, side, side)
            around = around + places.flatten(2).permute(2, 0, 1)[:, :, None].to(around.dtype)
        if self.config.global_token:
            mean = tokens.mean(dim=1)[None, :, None].expand(1, -1, around.shape[2], -1)  # (1, N, T, C)
            around = torch.cat([around, mean])
        return around

    def _wide_windows(self, tokens: Tensor, patch_grid: tuple[int, int], scale: int) -> Tensor:
        """(N, L, C) -> (K, N, T, C), zeros beyond the grid."""
        margin = self.config.window_margin
        if margin == 0:
            return windows(tokens, patch_grid, scale)
        below, right = extension(patch_grid, scale)
        beyond = (margin, right + margin, margin, below + margin)
        image = F.pad(tokens.unflatten(1, patch_grid), (0, 0, *beyond))  # (N, h', w', C)
        side = scale + 2 * margin
        around = image.unfold(1, side, scale).unfold(2, side, scale)  # (N, rows, cols, C, side, side)
        return around.permute(4, 5, 0, 1, 2, 3).flatten(3, 4).flatten(0, 1).contiguous()

    def _surroundings_mask(self, patch_grid: tuple[int, int], scale: int, device: torch.device) -> Tensor | None:
        """(T, K), True where there is something; None where there is everywhere."""
        if self.config.window_margin == 0 and window_mask(patch_grid, scale, device) is None:
            return None
        exists = torch.ones(1, patch_grid[0] * patch_grid[1], 1, device=device)
        mask = self._wide_windows(exists, patch_grid, scale)[:, 0, :, 0].T > 0  # (T, side*side)
        return F.pad(mask, (0, 1), value=True) if self.config.global_token else mask
