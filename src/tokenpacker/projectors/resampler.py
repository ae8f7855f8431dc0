"""The resampler of Qwen-VL: learned queries with positions on a grid attend to all patches of a tile.

Source: "Qwen-VL" (arXiv 2308.12966), section 2.1: one layer of cross-attention, 2-D sine positions on queries and keys.
As in the released model, queries and keys are normalised before the attention; LayerNorm and a linear layer follow.

Shapes: N tiles, (h, w) patch grid, L = h*w, (rows, cols) query grid, T = rows*cols, C vision width, D language width,
H heads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, ProjectorConfig, register, require_positive
from tokenpacker.projectors.layers import ceil_grid, require_grid

LAYER_NORM_EPS = 1e-6  # the released model's
HEAD_DIM = 128  # the released model's: 32 heads at D = 4096
LONGEST_WAVE = 10_000  # of sine positions, in units of 2 pi


@dataclass(frozen=True, kw_only=True)
class ResamplerConfig(ProjectorConfig):
    """Config of `Resampler`, which reads the query level alone.

    Args:
        query_grid: (rows, cols) of learned queries. Each gives one packed token, for every patch grid.
        num_heads: heads of the attention; None means one for each 128 channels of `language_dim`.
    """

    name: ClassVar[str] = "resampler"

    query_grid: tuple[int, int] = (12, 12)
    num_heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "query_grid", require_grid("query_grid", self.query_grid))
        require_positive("num_heads", self.attention_heads)
        if self.language_dim % self.attention_heads:
            raise ValueError(
                f"num_heads={self.attention_heads} does not divide language_dim={self.language_dim}; choose a divisor"
            )
        if self.language_dim % 4:
            raise ValueError(
                f"language_dim={self.language_dim} is not a multiple of 4, which 2-D sine positions need (sine and"
                " cosine of row and column); use another projector"
            )

    @property
    def attention_heads(self) -> int:
        """H, the heads of the attention."""
        return max(1, self.language_dim // HEAD_DIM) if self.num_heads is None else self.num_heads

    def token_grid(self, patch_grid: tuple[int, int], scale_factor: int | None = None) -> tuple[int, int]:
        """Returns the query grid. Raises ValueError for a scale factor that needs another grid."""
        if scale_factor is not None:
            require_positive("scale_factor", scale_factor)
            if (wanted := ceil_grid(patch_grid, scale_factor)) != self.query_grid:
                (rows, cols), (own_rows, own_cols) = wanted, self.query_grid
                raise ValueError(
                    f"scale_factor={scale_factor} asks for {rows}x{cols} tokens of patch_grid="
                    f"{patch_grid[0]}x{patch_grid[1]} but this resampler has {own_rows}x{own_cols} learned queries;"
                    f" leave it out, or train one with query_grid=({rows}, {cols})"
                )
        return self.query_grid


@register(ResamplerConfig)
class Resampler(Projector):
    """Cross-attention of learned queries to all patches, at the language model's width.

    Positions are computed in units of the query grid, at the centres of the patches, so any patch grid works. The
    released model stores them in a table for the queries, and interpolates it for the patches.
    """

    config: ResamplerConfig

    def __init__(self, config: ResamplerConfig):
        super().__init__()
        self.config = config
        dim = config.language_dim
        self.queries = nn.Parameter(torch.empty(config.query_grid[0] * config.query_grid[1], dim))
        self.patch_proj = nn.Linear(config.vision_dim, dim, bias=False)
        self.query_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.patch_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.query_proj = nn.Linear(dim, dim)
        self.key_proj = nn.Linear(dim, dim)
        self.value_proj = nn.Linear(dim, dim)
        self.attention_proj = nn.Linear(dim, dim)
        self.output_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.output_proj = nn.Linear(dim, dim, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Initialises linear layers as every projector does, and queries with the standard deviation 0.02."""
        super().init_weights()
        nn.init.trunc_normal_(self.queries, std=0.02)

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """Returns (N, T, D). Raises ValueError for features of other widths, and if the config's `token_grid` does."""
        self.check_features(features)
        token_grid = self.config.token_grid(features.patch_grid, scale_factor)
        patches = self.patch_norm(self.patch_proj(features.query))  # (N, L, C) -> (N, L, D)
        places = [sine_positions(grid, token_grid, patches) for grid in (token_grid, features.patch_grid)]
        queries = self.query_proj(self.query_norm(self.queries) + places[0])[None]  # (1, T, D)
        keys = self.key_proj(patches + places[1])  # (N, L, D)
        attended = F.scaled_dot_product_attention(
            self._split_heads(queries.expand(patches.shape[0], -1, -1)),
            self._split_heads(keys),
            self._split_heads(self.value_proj(patches)),
        )  # (N, H, T, D/H)
        tokens = self.attention_proj(attended.transpose(1, 2).flatten(2).contiguous())  # (N, T, D)
        return self.output_proj(self.output_norm(tokens))

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """(N, T, D) -> (N, H, T, D/H), a view."""
        return tokens.unflatten(-1, (self.config.attention_heads, -1)).transpose(1, 2)


def sine_positions(grid: tuple[int, int], unit_grid: tuple[int, int], like: Tensor) -> Tensor:
    """Returns (rows*cols, D), the positions of a grid's cells in units of `unit_grid`, which covers the same tile.

    The first half of the channels holds sines and cosines of the column, the second half those of the row. They are
    computed in float32, and have the dtype and the device of `like` (..., D).
    """
    quarter = like.shape[-1] // 4
    exponents = torch.arange(quarter, dtype=torch.float32, device=like.device) / quarter
    waves = []
    for cells, units in zip(grid, unit_grid, strict=True):
        centres = (torch.arange(cells, dtype=torch.float32, device=like.device) + 0.5) * (units / cells) - 0.5
        angles = centres[:, None] * LONGEST_WAVE**-exponents  # (cells, D/4)
        waves.append(torch.cat([angles.sin(), angles.cos()], dim=-1))  # (cells, D/2)
    rows, cols = waves
    by_column = cols[None].expand(grid[0], -1, -1)  # (rows, cols, D/2)
    by_row = rows[:, None].expand(-1, grid[1], -1)
    return torch.cat([by_column, by_row], dim=-1).flatten(0, 1).to(like.dtype)
