"""TokenPacker: a coarse query absorbs its own window of multi-level features by attention.

Source: "TokenPacker: Efficient Visual Projector for Multimodal LLM" (arXiv 2407.02392).

Shapes: N tiles, (h, w) patch grid, L = h*w, s scale factor, (rows, cols) = (ceil(h/s), ceil(w/s)) token grid,
T = rows*cols packed tokens, W = s*s patches per window, M levels, C vision width, D language width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenpacker.features import VisionFeatures
from tokenpacker.projectors.base import Projector, register, require_positive
from tokenpacker.projectors.folded import FastPath, FoldedTokenPacker, Windows
from tokenpacker.projectors.layers import ScaledConfig, two_linears

LAYER_NORM_EPS = 1e-6  # released weights need this; torch's default is 1e-5


@dataclass(frozen=True, kw_only=True)
class TokenPackerProjectorConfig(ScaledConfig):
    """Config of `TokenPacker`. No weight's shape depends on `scale_factor`: it is a default, not a limit.

    Args:
        num_levels: M, the paper uses four (12, 16, 22, 23 of CLIP-L/336).
        num_heads: heads of the window attention; the released weights have 8 of width 128.
        scale_factor: s, how many patches per side one packed token stands for.
    """

    name: ClassVar[str] = "token-packer"

    num_levels: int = 4
    num_heads: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive("num_heads", self.num_heads)
        if self.vision_dim % self.num_heads:
            raise ValueError(
                f"num_heads={self.num_heads} does not divide vision_dim={self.vision_dim}; choose a divisor"
            )


class WindowAttention(nn.Module):
    """Multi-head attention of one query per window over that window's keys and values.

    Released weights need this: the query is scaled before its product with the keys, as `nn.MultiheadAttention` does.
    Fused attention rounds elsewhere, and after the output MLP that shows in the fifth decimal.
    """

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.query_proj = nn.Linear(dim, dim)
        self.key_proj = nn.Linear(dim, dim)
        self.value_proj = nn.Linear(dim, dim)
        self.output_proj = nn.Linear(dim, dim)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(N, T, C) from queries (N, T, C), keys and values (W, N, T, C).

        `mask` (T, W) is True where a patch exists; None where all do.
        """
        weights = self.weights(queries, keys, mask).flatten(0, 2).unsqueeze(1)  # (N*T*H, 1, W)
        attended = weights @ self._split_heads(self.value_proj(values))  # (N*T*H, 1, C/H)
        return self.output_proj(attended.view_as(queries))

    def weights(self, queries: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
        """(N, T, H, W), the share that each patch of its window has in each head of a packed token."""
        query = self.query_proj(queries).unflatten(-1, (self.num_heads, -1))  # (N, T, H, C/H)
        query = query * query.shape[-1] ** -0.5
        key = self._split_heads(self.key_proj(keys))  # (N*T*H, W, C/H)
        scores = query.flatten(0, 2).unsqueeze(1) @ key.transpose(1, 2)  # (N*T*H, 1, W)
        scores = scores.view(*query.shape[:3], -1)  # (N, T, H, W)
        return (scores if mask is None else scores.masked_fill(~mask[:, None], float("-inf"))).softmax(dim=-1)

    def _split_heads(self, tokens: Tensor) -> Tensor:
        """(W, N, T, C) -> (N*T*H, W, C/H), a view: with the window's axis in front, all others are one batch."""
        return tokens.unflatten(-1, (self.num_heads, -1)).flatten(1, 3).transpose(0, 1)


@register(TokenPackerProjectorConfig)
class TokenPacker(Projector):
    """The projector of the paper, for any encoder, language model, patch grid and scale factor.

    A grid that s does not divide is extended to the right and below. Edge windows then hold fewer patches:
    the missing ones are masked out of the attention, and the coarse query reads the last real row or column in
    their place. On a grid that s divides nothing is extended and the result is the released one.

    Where nothing is differentiated, a call of many patches computes the same function from folded weights, in fewer
    multiplications: see `token_packer_fast.py`. It does so on a CPU, in float32 or float64 without autocast, with C of
    at least 256 and at least 2,304 patches, which are four tiles of CLIP-L/336. At C = 1024 and D = 4096 the folded
    weights are made at the first such call in about a second, and take 40 MiB beside the projector's 140.

    Folded and plain results differ by rounding, 1e-6 of the largest value, and are equally near to the exact ones. So
    the same tile may have other last digits in a large batch than alone. Set `folds_weights` to False for results
    whose digits are the released code's at any size, to True to fold for small calls, too, where folding is possible.
    """

    config: TokenPackerProjectorConfig
    folds_weights: bool | None = None

    def __init__(self, config: TokenPackerProjectorConfig):
        super().__init__()
        self.config = config
        dim, levels_dim = config.vision_dim, config.vision_dim * config.num_levels
        self.query_proj = nn.Linear(dim, dim, bias=False)
        self.key_mlp = two_linears(levels_dim, dim)
        self.value_mlp = two_linears(levels_dim, dim)
        self.query_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.key_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.value_norm = nn.LayerNorm(dim, eps=LAYER_NORM_EPS)
        self.attention = WindowAttention(dim, config.num_heads)
        self.output_mlp = two_linears(dim, config.language_dim)
        self._fast_path = FastPath()
        self.init_weights()

    def forward(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """(N, T, D) packed tokens in row-major order; `scale_factor=None` takes the config's.

        Raises:
            ValueError: when the features' widths are not the config's or the scale factor exceeds the grid.
        """
        self.check_features(features)
        folded = self._fast_path.folded(self, features) if type(self) is TokenPacker else None
        if folded is not None:
            return self._forward_folded(folded, features, scale_factor)
        queries, keys, mask = self._queries_and_keys(features, scale_factor)
        values = self._windows(self.value_norm(self.value_mlp(features.levels)), features.patch_grid, scale_factor)
        return self.output_mlp(self.attention(queries, keys, values, mask))  # (N, T, C) -> (N, T, D)

    def attention_weights(self, features: VisionFeatures, scale_factor: int | None = None) -> Tensor:
        """(N, T, H, W): how much each head of each packed token takes from the patches of its window, row by row.

        Patches beyond the grid have weight 0. Raises as `forward`.
        """
        self.check_features(features)
        queries, keys, mask = self._queries_and_keys(features, scale_factor)
        return self.attention.weights(queries, keys, mask)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TokenPacker:
        """As of every module; the folded weights do not move along."""
        self._fast_path.drop()
        return super()._apply(fn, recurse)

    def _forward_folded(self, folded: FoldedTokenPacker, features: VisionFeatures, scale_factor: int | None) -> Tensor:
        grid = features.patch_grid
        scale, height, width = self._extents(grid, scale_factor)
        mask = self._window_mask(grid, scale_factor, features.levels.device)
        coarse = self._coarse_query(features.query, grid, scale_factor)  # (N, T, C)
        return folded(coarse, features.levels, Windows(grid, (height, width), scale, mask))

    def _queries_and_keys(
        self, features: VisionFeatures, scale_factor: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        grid = features.patch_grid
        queries = self.query_norm(self.query_proj(self._coarse_query(features.query, grid, scale_factor)))  # (N, T, C)
        keys = self._windows(self.key_norm(self.key_mlp(features.levels)), grid, scale_factor)  # (W, N, T, C)
        return queries, keys, self._window_mask(grid, scale_factor, keys.device)

    def _extents(self, patch_grid: tuple[int, int], scale_factor: int | None) -> tuple[int, int, int]:
        """s and the height and width of the patch grid after extension."""
        rows, cols = self.config.token_grid(patch_grid, scale_factor)
        scale = self.config.resolve_scale(patch_grid, scale_factor)
        return scale, rows * scale, cols * scale

    def _coarse_query(self, tokens: Tensor, patch_grid: tuple[int, int], scale_factor: int | None) -> Tensor:
        """(N, L, C) -> (N, T, C), bilinear interpolation by 1/s (half-pixel centres, no antialias) in float32.

        Its samples lie on window centres: an odd s reads the centre patch, an even s the mean of the central four.
        """
        scale, height, width = self._extents(patch_grid, scale_factor)
        image = tokens.unflatten(1, patch_grid).permute(0, 3, 1, 2).float()  # (N, C, h, w)
        if (height, width) != patch_grid:
            image = F.pad(image, (0, width - patch_grid[1], 0, height - patch_grid[0]), mode="replicate")
        image = F.interpolate(image, (height // scale, width // scale), mode="bilinear")  # (N, C, rows, cols)
        return image.permute(0, 2, 3, 1).flatten(1, 2).to(tokens.dtype)

    def _windows(self, tokens: Tensor, patch_grid: tuple[int, int], scale_factor: int | None) -> Tensor:
        """(N, L, C) -> (W, N, T, C), zeros where the grid was extended."""
        scale, height, width = self._extents(patch_grid, scale_factor)
        image = tokens.unflatten(1, patch_grid)  # (N, h, w, C)
        if (height, width) != patch_grid:
            image = F.pad(image, (0, 0, 0, width - patch_grid[1], 0, height - patch_grid[0]))
        image = image.unflatten(2, (-1, scale)).unflatten(1, (-1, scale))  # (N, rows, s, cols, s, C)
        return image.permute(2, 4, 0, 1, 3, 5).flatten(3, 4).flatten(0, 1).contiguous()  # a lone window is a view

    def _window_mask(
        self, patch_grid: tuple[int, int], scale_factor: int | None, device: torch.device
    ) -> Tensor | None:
        """(T, W), True where a window's place holds a patch; None when every place does."""
        _, height, width = self._extents(patch_grid, scale_factor)
        if (height, width) == patch_grid:
            return None
        exists = torch.ones(1, patch_grid[0] * patch_grid[1], 1, dtype=torch.bool, device=device)
        return self._windows(exists, patch_grid, scale_factor)[:, 0, :, 0].T
